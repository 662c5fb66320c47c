// Reads the buffers and attributes that XLA passes to a call, and checks that they are of the types
// and sizes that the call needs: a program is data, and may come from anywhere.

enum { F32 = XLA_FFI_DataType_F32, S32 = XLA_FFI_DataType_S32, S8 = XLA_FFI_DataType_S8 };

#define ANY -1        // of a size
#define MOST_KEYS 65536  // of a query, for their scores are on the stack

typedef struct {
  XLA_FFI_CallFrame* frame;
  int64_t at;
  int wrong;  // whether something was not as the call needs it
} Arguments;

static void need(Arguments* a, int condition) { a->wrong |= !condition; }
static int64_t dim(const XLA_FFI_Buffer* b, int64_t i) { return b->dims[i]; }

// The buffer itself if it has this type, rank and sizes; else an empty one.
static const XLA_FFI_Buffer* checked(Arguments* a, const XLA_FFI_Buffer* b, int type, int64_t rank,
                                     const int64_t* sizes) {
  static int32_t zero[4];
  static int64_t none[4];
  static const XLA_FFI_Buffer empty = {.data = zero, .dims = none};
  int fits = b && (int)b->dtype == type && b->rank == rank;
  for (int64_t i = 0; fits && i < rank; i++) fits = sizes[i] == ANY || b->dims[i] == sizes[i];
  need(a, fits);
  return fits ? b : &empty;
}

static const XLA_FFI_Buffer* peek(const Arguments* a) {
  return a->at < a->frame->args.size ? a->frame->args.args[a->at] : NULL;
}
static int64_t rank_of_next(const Arguments* a) { return peek(a) ? peek(a)->rank : 0; }

// The next argument, or result i, of a type and of the sizes that follow.
#define SIZES(...) sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (int64_t[]) { __VA_ARGS__ }
#define next(a, type, ...) next_buffer(a, type, SIZES(__VA_ARGS__))
#define result(a, i, type, ...) result_data(a, i, type, SIZES(__VA_ARGS__))

static const XLA_FFI_Buffer* next_buffer(Arguments* a, int type, int64_t rank,
                                         const int64_t* sizes) {
  const XLA_FFI_Buffer* b = checked(a, peek(a), type, rank, sizes);
  a->at++;
  return b;
}
// Columns of the first result.
static int64_t result_columns(const Arguments* a) {
  const XLA_FFI_Buffer* b = a->frame->rets.size ? a->frame->rets.rets[0] : NULL;
  return b && b->rank == 2 ? dim(b, 1) : 0;
}
static void* result_data(Arguments* a, int64_t i, int type, int64_t rank, const int64_t* sizes) {
  XLA_FFI_Rets* rets = &a->frame->rets;
  return checked(a, i < rets->size ? rets->rets[i] : NULL, type, rank, sizes)->data;
}

// The next argument, a number.
static int64_t next_count(Arguments* a) {
  int64_t n = *(int32_t*)next_buffer(a, S32, 0, NULL)->data;
  need(a, n >= 0);
  return a->wrong ? 0 : n;
}

static const void* attribute(const Arguments* a, const char* name, int type) {
  const XLA_FFI_Attrs* attrs = &a->frame->attrs;
  for (int64_t i = 0; i < attrs->size; i++)
    if ((int)attrs->types[i] == type && attrs->names[i]->len == strlen(name) &&
        !memcmp(attrs->names[i]->ptr, name, strlen(name)))
      return attrs->attrs[i];
  return NULL;
}

// An attribute of the call that is a number of at least `low`.
static int64_t number(Arguments* a, const char* name, int64_t low) {
  const XLA_FFI_Scalar* s = attribute(a, name, XLA_FFI_AttrType_SCALAR);
  int there = s && s->dtype == XLA_FFI_DataType_S64 && *(const int64_t*)s->value >= low;
  need(a, there);
  return there ? *(const int64_t*)s->value : low;
}

// Needs every index to be at least `low` and below `high`.
static void need_below(Arguments* a, const int32_t* indices, int64_t n, int64_t low, int64_t high) {
  int inside = 1;
  for (int64_t i = 0; !a->wrong && i < n; i++) inside &= indices[i] >= low && indices[i] < high;
  need(a, inside);
}

// Reads a matrix of k inputs and n outputs: its kernel, scale and total if int8, bias if `bias`.
static Matrix next_matrix(Arguments* a, int64_t k, int64_t n, int bias) {
  int64_t panels = up(n, PANEL);
  Matrix w = {.k = k, .k4 = up(k, 4), .n = n};
  w.quantized = rank_of_next(a) == 4;
  w.panel_bytes = w.quantized ? w.k4 * 4 * PANEL : k * PANEL * 4;
  if (w.quantized) {
    w.kernel = next(a, S8, panels, w.k4, PANEL, 4)->data;
    w.scale = next(a, F32, panels * PANEL)->data;
    w.total = next(a, S32, panels * PANEL)->data;
  } else {
    w.kernel = next(a, F32, panels, k, PANEL)->data;
  }
  if (bias) w.bias = next(a, F32, n)->data;
  return w;
}

static XLA_FFI_Error* failed(XLA_FFI_CallFrame* f, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message, .errc = code};
  return f->api->XLA_FFI_Error_Create(&args);
}
static XLA_FFI_Error* no_memory(XLA_FFI_CallFrame* f) {
  return failed(f, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                "the translator's kernels have run out of memory");
}
static XLA_FFI_Error* wrong_sizes(XLA_FFI_CallFrame* f) {
  return failed(f, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                "a program called a kernel of the translator with arrays that do not fit it");
}

// Answers XLA's metadata query; true for every call that is not an execution.
static int answered(XLA_FFI_CallFrame* f) {
  XLA_FFI_Extension_Base* extension = f->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* m = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
    m->api_version = (XLA_FFI_Api_Version){.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE,
                                           .major_version = XLA_FFI_API_MAJOR,
                                           .minor_version = XLA_FFI_API_MINOR};
    m->traits = 0;
    return 1;
  }
  return f->stage != XLA_FFI_ExecutionStage_EXECUTE;
}

// Defines the custom call automoe_NAME of the frame `f`; its body reads the arguments from `a`.
#define HANDLER(name)                                                                          \
  static XLA_FFI_Error* name(XLA_FFI_CallFrame* f, Arguments a);                               \
  __attribute__((visibility("default"))) XLA_FFI_Error* automoe_##name(XLA_FFI_CallFrame* f) { \
    return answered(f) ? NULL : name(f, (Arguments){.frame = f});                              \
  }                                                                                            \
  static XLA_FFI_Error* name(XLA_FFI_CallFrame* f, Arguments a)
