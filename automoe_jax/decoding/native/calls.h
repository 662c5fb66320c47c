// Reads the buffers and attributes that XLA passes to a call.

typedef struct {
  XLA_FFI_CallFrame* frame;
  int64_t at;
} Arguments;

static XLA_FFI_Buffer* next(Arguments* a) { return a->frame->args.args[a->at++]; }
static void* next_data(Arguments* a) { return next(a)->data; }
static int64_t next_count(Arguments* a) { return *(int32_t*)next(a)->data; }
static void* result(XLA_FFI_CallFrame* f, int64_t i) {
  return ((XLA_FFI_Buffer*)f->rets.rets[i])->data;
}
static int64_t dim(const XLA_FFI_Buffer* b, int64_t i) { return b->dims[i]; }

static const void* attribute(XLA_FFI_CallFrame* f, const char* name) {
  for (int64_t i = 0; i < f->attrs.size; i++)
    if (f->attrs.names[i]->len == strlen(name) &&
        !memcmp(f->attrs.names[i]->ptr, name, strlen(name)))
      return f->attrs.attrs[i];
  return NULL;
}

static int64_t number(XLA_FFI_CallFrame* f, const char* name) {
  const XLA_FFI_Scalar* s = attribute(f, name);
  return s ? *(const int64_t*)s->value : 0;
}

// Reads a matrix of k inputs and n outputs: its kernel, scale and total if int8, bias if `bias`.
static Matrix next_matrix(Arguments* a, int64_t k, int64_t n, int bias) {
  const XLA_FFI_Buffer* b = next(a);
  Matrix w = {.kernel = b->data, .k = k, .k4 = up(k, 4), .n = n};
  w.quantized = b->dtype == XLA_FFI_DataType_S8;
  w.panel_bytes = w.quantized ? w.k4 * 4 * PANEL : k * PANEL * 4;
  if (w.quantized) {
    w.scale = next_data(a);
    w.total = next_data(a);
  }
  if (bias) w.bias = next_data(a);
  return w;
}

static XLA_FFI_Error* no_memory(XLA_FFI_CallFrame* f) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = "the translator's kernels have run out of memory",
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return f->api->XLA_FFI_Error_Create(&args);
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
