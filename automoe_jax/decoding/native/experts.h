// Experts: routing, and what is computed of their rows.

typedef struct {
  const float *x, *kernel, *bias;  // kernel (D, E)
  int64_t rows, d, experts, top_k, gate;
  int32_t* expert;  // (R, top_k)
  float* p;         // factors on their outputs
} Route;

enum { PROBABILITY, COUNT, NORMALISED };  // GATES in architecture/space.py

static void route_item(void* job, int64_t item, int slot) {
  const Route* j = job;
  float p[up(j->experts, LANES) * LANES];
  for (int64_t r = item * ROWS_PER_ITEM; r < least((item + 1) * ROWS_PER_ITEM, j->rows); r++) {
    for (int64_t e = 0; e < j->experts; e++) p[e] = 0;
    for (int64_t i = 0; i < j->d; i++)
      for (int64_t e = 0; e < j->experts; e++)
        p[e] += j->x[r * j->d + i] * j->kernel[i * j->experts + e];
    for (int64_t e = 0; e < j->experts; e++) p[e] += j->bias[e];
    softmax(p, j->experts);
    float* chosen = j->p + r * j->top_k;
    float sum = 0;
    for (int64_t k = 0; k < j->top_k; k++) {
      int64_t best = 0;
      for (int64_t e = 1; e < j->experts; e++) best = p[e] > p[best] ? e : best;
      j->expert[r * j->top_k + k] = best;
      chosen[k] = p[best];
      sum += p[best];
      p[best] = -1;
    }
    float factor = j->gate == COUNT ? j->experts : j->gate == NORMALISED ? 1 / sum : 1;
    for (int64_t k = 0; k < j->top_k; k++) chosen[k] *= factor;
  }
}

// The factor of an expert for a row, NULL if the row is not routed to it.
static const float* routed(const Route* j, int64_t row, int64_t e) {
  for (int64_t i = row * j->top_k; i < (row + 1) * j->top_k; i++)
    if (j->expert[i] == e) return j->p + i;
  return NULL;
}

#define MOST_EXPERTS 1024

// Checks the arguments of experts_add_norm after x, before the first is used. All matrices must be
// fp32, or all int8.
static void need_experts(Arguments a, const int64_t* sizes, int64_t experts, int64_t d, int* wrong) {
  int kind = -1;
  if (experts > 1) next(&a, F32, d, experts), next(&a, F32, experts);
  for (int64_t e = 0; !a.wrong && e < experts; e++) {
    need(&a, sizes[e] >= 0);
    if (sizes[e] <= 0) continue;
    Matrix fc1 = next_matrix(&a, d, sizes[e], 1), fc2 = next_matrix(&a, sizes[e], d, 1);
    if (kind < 0) kind = fc1.quantized;
    need(&a, fc1.quantized == kind && fc2.quantized == kind);
  }
  next(&a, F32, d), next(&a, F32, d);
  *wrong |= a.wrong;
}

// An expert and the rows that are routed to it.
typedef struct {
  Matrix fc1, fc2;
  const int32_t* list;  // its rows, NULL for all
  int64_t rows, size;   // of an identity 0
  float* out;           // (rows, D)
} Expert;

#define GROUP_BYTES 1048576  // of hidden rows of experts whose products are one job

static int64_t hidden_bytes(const Expert* e) { return e->rows * e->size * 4; }

// Runs those of the `n` experts that have rows; 0 if memory has run out. `all` is x, prepared.
static int run_experts(Expert* experts, int64_t n, const Input* all, float* out) {
  int64_t bytes = 0, quantized = 0, rows = 0, used = 0;
  for (Expert* e = experts; e < experts + n; e++)
    if (e->rows && e->size) {
      bytes += hidden_bytes(e);
      quantized += e->fc2.quantized ? e->rows * e->fc2.k4 * 4 : 0;
      rows += e->rows;
    }
  float *h = scratch(HIDDEN, bytes), *scale = quantized ? scratch(HIDDEN_SCALES, rows * 4) : NULL;
  uint8_t* q = quantized ? scratch(HIDDEN_QUANTIZED, quantized) : NULL;
  if (!h || (quantized && (!scale || !q))) return 0;
  Input hidden[n];
  Product products[n];
  for (Expert* e = experts; e < experts + n; e++) {
    if (!e->rows || !e->size) continue;
    Input in = *all;
    in.rows = e->rows;
    in.which = e->list;
    products[used] = product_of(&in, &e->fc1, 1, h);
    hidden[used++] = (Input){.x = h, .q = q, .scale = scale, .rows = e->rows, .k = e->size,
                             .k4 = e->fc2.k4};
    h += e->rows * e->size;
    if (quantized) q += e->rows * e->fc2.k4 * 4, scale += e->rows;
  }
  share_products(used, products);
  used = 0;
  for (Expert* e = experts; e < experts + n; e++) {
    if (!e->rows || !e->size) continue;
    if (e->fc2.quantized) share_rows(e->rows, quantize_item, hidden + used);
    e->out = out;
    products[used] = product_of(hidden + used, &e->fc2, 0, out);
    out += e->rows * e->fc2.n;
    used++;
  }
  share_products(used, products);
  return 1;
}

// [n], x (R, D), router (D, E) and its bias if there are several experts, fc1 and fc2 with bias of
// each expert that is not the identity, gamma, beta -> LayerNorm(x + experts(x))
//
// Rows are grouped by expert; the weights of an expert without rows are not read.
HANDLER(experts_add_norm) {
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* input = next(&a, F32, ANY, ANY);
  const float* x = input->data;
  int64_t d = dim(input, 1), top_k = number(&a, "top_k", 1), gate = number(&a, "gate", 0);
  float* y = result(&a, 0, F32, dim(input, 0), d);
  const XLA_FFI_Array* sizes_attribute = attribute(&a, "sizes", XLA_FFI_AttrType_ARRAY);
  need(&a, sizes_attribute && sizes_attribute->dtype == XLA_FFI_DataType_S64 &&
               (int64_t)sizes_attribute->size >= top_k && sizes_attribute->size <= MOST_EXPERTS &&
               n <= dim(input, 0));
  if (a.wrong) return wrong_sizes(f);
  const int64_t* sizes = sizes_attribute->data;
  int64_t experts = sizes_attribute->size;
  need_experts(a, sizes, experts, d, &a.wrong);
  if (a.wrong) return wrong_sizes(f);
  Route route = {.x = x, .rows = n, .d = d, .experts = experts, .top_k = top_k,
                 .gate = gate};
  int32_t* list = NULL;
  float* out = y;
  if (experts > 1) {
    route.kernel = next(&a, F32, d, experts)->data;
    route.bias = next(&a, F32, experts)->data;
    char* memory = scratch(ROUTED, n * top_k * 12);
    out = scratch(RESULT, n * top_k * d * 4);
    if (!memory || !out) return no_memory(f);
    route.expert = (int32_t*)memory;
    route.p = (float*)(route.expert + n * top_k);
    list = (int32_t*)(route.p + n * top_k);
    share_rows(n, route_item, &route);
    memset(y, 0, n * d * 4);
  }
  Expert own[experts];
  Input all = {.rows = 0};  // x, prepared for the first expert that is not the identity
  for (int64_t e = 0; e < experts; e++) {
    own[e] = (Expert){.list = list, .rows = list ? 0 : n, .size = sizes[e]};
    for (int64_t r = 0; list && r < n; r++)
      if (routed(&route, r, e)) list[own[e].rows++] = r;
    if (list) list += own[e].rows;
    if (!sizes[e]) continue;
    own[e].fc1 = next_matrix(&a, d, sizes[e], 1);
    own[e].fc2 = next_matrix(&a, sizes[e], d, 1);
    if (own[e].rows && !all.rows && !prepare(&all, x, n, &own[e].fc1, QUANTIZED))
      return no_memory(f);
  }
  for (int64_t first = 0, end; first < experts; first = end) {
    int64_t bytes = hidden_bytes(own + first);
    for (end = first + 1; end < experts && bytes + hidden_bytes(own + end) <= GROUP_BYTES; end++)
      bytes += hidden_bytes(own + end);
    if (bytes && !run_experts(own + first, end - first, &all, out)) return no_memory(f);
    for (int64_t e = first; list && e < end; e++)
      for (int64_t i = 0; i < own[e].rows; i++) {
        int64_t r = own[e].list[i];
        const float* found = sizes[e] ? own[e].out + i * d : x + r * d;
        add_scaled(y + r * d, *routed(&route, r, e), found, d);
      }
  }
  if (!list && !sizes[0]) memcpy(y, x, n * d * 4);
  const float *gamma = next(&a, F32, d)->data, *beta = next(&a, F32, d)->data;
  add_norm((AddNorm){y, x, gamma, beta, n, d});
  return NULL;
}
