// Products of rows with packed matrices, fp32 and int8.

typedef struct {
  const void* kernel;
  const float* scale;   // per column, if int8
  const int32_t* total;  // column sums, if int8
  const float* bias;    // NULL for none
  int64_t k, k4, n, panel_bytes;
  int quantized;
} Matrix;

// Fully unrolled, so that the sums stay in registers.
#define FLOAT_ROWS(R)                                                                          \
  static void float_rows_##R(const float* const* x, const float* w, int64_t k, float* tile) {  \
    vec a[R][PANEL / LANES];                                                                   \
    for (int r = 0; r < R; r++)                                                                \
      for (int c = 0; c < PANEL / LANES; c++) a[r][c] = (vec){};                               \
    for (int64_t i = 0; i < k; i++) {                                                          \
      __builtin_prefetch(w + i * PANEL + 1024);                                                \
      __builtin_prefetch(w + i * PANEL + 1024 + 16);                                           \
      for (int c = 0; c < PANEL / LANES; c++) {                                                \
        vec own = *(const vec*)(w + i * PANEL + c * LANES);                                    \
        for (int r = 0; r < R; r++) a[r][c] += x[r][i] * own;                                  \
      }                                                                                        \
    }                                                                                          \
    for (int r = 0; r < R; r++)                                                                \
      for (int c = 0; c < PANEL / LANES; c++) *(vec*)(tile + r * PANEL + c * LANES) = a[r][c]; \
  }

// x is stored with an offset of 128 (1..255); w is in -127..127.
#if defined(__AVX512VNNI__)
// Each sum is a variable and the instruction is inline assembly: with an array or the intrinsic, gcc
// copies all sums in every iteration.
#define ADD_DOTS(sums, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w))
#define EACH_1(F) F(0)
#define EACH_2(F) EACH_1(F) F(1)
#define EACH_3(F) EACH_2(F) F(2)
#define EACH_4(F) EACH_3(F) F(3)
#define EACH_5(F) EACH_4(F) F(4)
#define EACH_6(F) EACH_5(F) F(5)
#define EACH_7(F) EACH_6(F) F(6)
#define EACH_8(F) EACH_7(F) F(7)
#define BEGIN(r)                                              \
  __m512i a##r = _mm512_setzero_si512(), b##r = a##r;         \
  const uint8_t* x##r = x[r];
#define ADD(r)                                                \
  memcpy(&four, x##r + 4 * i, 4);                             \
  s = _mm512_set1_epi32(four);                                \
  ADD_DOTS(a##r, s, w0);                                      \
  ADD_DOTS(b##r, s, w1);
#define STORE(r)                                              \
  _mm512_storeu_si512(tile + r * PANEL, a##r);                \
  _mm512_storeu_si512(tile + r * PANEL + 16, b##r);
#define INT_ROWS(R)                                                                            \
  static void int_rows_##R(const uint8_t* const* x, const int8_t* w, int64_t k4, int32_t* tile) { \
    EACH_##R(BEGIN) for (int64_t i = 0; i < k4; i++) {                                         \
      __m512i w0 = _mm512_loadu_si512(w + i * 128), w1 = _mm512_loadu_si512(w + i * 128 + 64), s; \
      int32_t four;                                                                            \
      __builtin_prefetch(w + i * 128 + 4096);                                                  \
      __builtin_prefetch(w + i * 128 + 4096 + 64);                                             \
      EACH_##R(ADD)                                                                            \
    }                                                                                          \
    EACH_##R(STORE)                                                                            \
  }
#elif defined(__AVX2__)
// 16-bit products, because the 8-bit instruction saturates. Half a panel at a time for all rows, as
// many sums as registers hold.
#define INT_ROWS(R)                                                                            \
  static void int_rows_##R(const uint8_t* const* x, const int8_t* w, int64_t k4, int32_t* tile) { \
    for (int half = 0; half < 2; half++) {                                                     \
      const int8_t* own = w + 64 * half;                                                       \
      __m256i a[R][4], s[R];                                                                   \
      for (int r = 0; r < R; r++)                                                              \
        for (int c = 0; c < 4; c++) a[r][c] = _mm256_setzero_si256();                          \
      for (int64_t i = 0; i < k4; i++) {                                                       \
        __builtin_prefetch(own + i * 128 + 4096);                                              \
        for (int r = 0; r < R; r++) {                                                          \
          int32_t four;                                                                        \
          memcpy(&four, x[r] + 4 * i, 4);                                                      \
          s[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));                                   \
        }                                                                                      \
        for (int c = 0; c < 4; c++) {                                                          \
          const __m128i* at = (const __m128i*)(own + i * 128 + c * 16);                        \
          __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));                               \
          for (int r = 0; r < R; r++)                                                          \
            a[r][c] = _mm256_add_epi32(a[r][c], _mm256_madd_epi16(s[r], b));                   \
        }                                                                                      \
      }                                                                                        \
      for (int r = 0; r < R; r++)                                                              \
        for (int c = 0; c < 4; c++) {                                                          \
          int32_t pairs[8];                                                                    \
          _mm256_storeu_si256((__m256i*)pairs, a[r][c]);                                       \
          for (int i = 0; i < 4; i++)                                                          \
            tile[r * PANEL + 16 * half + 4 * c + i] = pairs[2 * i] + pairs[2 * i + 1];         \
        }                                                                                      \
    }                                                                                          \
  }
#else
#define INT_ROWS(R)                                                                            \
  static void int_rows_##R(const uint8_t* const* x, const int8_t* w, int64_t k4, int32_t* tile) { \
    for (int r = 0; r < R; r++) {                                                              \
      int32_t a[PANEL] = {0};                                                                  \
      for (int64_t i = 0; i < k4; i++)                                                         \
        for (int c = 0; c < PANEL; c++)                                                        \
          for (int b = 0; b < 4; b++) a[c] += x[r][4 * i + b] * w[i * 128 + 4 * c + b];        \
      memcpy(tile + r * PANEL, a, sizeof a);                                                   \
    }                                                                                          \
  }
#endif

FLOAT_ROWS(1) FLOAT_ROWS(2) FLOAT_ROWS(3) INT_ROWS(1) INT_ROWS(2) INT_ROWS(3)
#if MOST_ROWS == 8
FLOAT_ROWS(4) FLOAT_ROWS(5) FLOAT_ROWS(6) FLOAT_ROWS(7) FLOAT_ROWS(8)
INT_ROWS(4) INT_ROWS(5) INT_ROWS(6) INT_ROWS(7) INT_ROWS(8)
#define TABLE(name) {0, name##1, name##2, name##3, name##4, name##5, name##6, name##7, name##8}
#else
#define TABLE(name) {0, name##1, name##2, name##3}
#endif
static void (*const float_rows[])(const float* const*, const float*, int64_t, float*) =
    TABLE(float_rows_);
static void (*const int_rows[])(const uint8_t* const*, const int8_t*, int64_t, int32_t*) =
    TABLE(int_rows_);

// Input rows of a product: float, or uint8 with a scale per row.
typedef struct {
  const float* x;
  const int32_t* which;  // indices of rows of x, NULL for the first rows
  uint8_t* q;
  float* scale;
  int64_t rows, k, k4;
} Input;

// One tile of a product with bias: `rows` rows from `first`, all columns of a panel.
static void tile(const Input* in, const Matrix* w, int64_t panel, int64_t first, int rows,
                 float* out) {
  const char* kernel = (const char*)w->kernel + panel * w->panel_bytes;
  int64_t column = panel * PANEL, columns = least(PANEL, w->n - column);
  int64_t row[MOST_ROWS];
  for (int r = 0; r < rows; r++) row[r] = in->which ? in->which[first + r] : first + r;
  if (!w->quantized) {
    const float* x[MOST_ROWS];
    for (int r = 0; r < rows; r++) x[r] = in->x + row[r] * in->k;
    float_rows[rows](x, (const float*)kernel, w->k, out);
  } else {
    const uint8_t* x[MOST_ROWS];
    int32_t sums[MOST_ROWS * PANEL];
    for (int r = 0; r < rows; r++) x[r] = in->q + row[r] * in->k4 * 4;
    int_rows[rows](x, (const int8_t*)kernel, w->k4, sums);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < PANEL; c += LANES) {
        ivec s = *(ivec*)(sums + r * PANEL + c) - 128 * *(const ivec*)(w->total + column + c);
        vec scale = in->scale[row[r]] * *(const vec*)(w->scale + column + c);
        *(vec*)(out + r * PANEL + c) = __builtin_convertvector(s, vec) * scale;
      }
  }
  if (w->bias)
    for (int r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) out[r * PANEL + c] += w->bias[column + c];
}

// Splits rows evenly into blocks of at most MOST_ROWS.
static inline int block_rows(int64_t at, int64_t end) {
  return (int)up(end - at, up(end - at, MOST_ROWS));
}

typedef struct {
  Input in;
  const Matrix* w;
  float* y;
  int relu;
  int64_t group, groups, chunk, items;
} Product;

static void product_item(void* job, int64_t item, int slot) {
  const Product* p = job;
  int64_t panels = up(p->w->n, PANEL);
  int64_t from = item % p->groups * p->group, to = least(from + p->group, panels);
  int64_t first = item / p->groups * p->chunk, end = least(first + p->chunk, p->in.rows);
  float out[MOST_ROWS * PANEL];
  for (int64_t panel = from; panel < to; panel++) {
    int64_t column = panel * PANEL, columns = least(PANEL, p->w->n - column);
    for (int64_t at = first, rows; at < end; at += rows) {
      rows = block_rows(at, end);
      tile(&p->in, p->w, panel, at, rows, out);
      for (int r = 0; r < rows; r++) {
        float* y = p->y + (at + r) * p->w->n + column;
        const float* t = out + r * PANEL;
        if (columns == PANEL) {
          for (int c = 0; c < PANEL; c += LANES) {
            vec a = *(const vec*)(t + c);
            *(vec*)(y + c) = p->relu ? larger(a, (vec){}) : a;
          }
        } else {
          for (int64_t c = 0; c < columns; c++) y[c] = p->relu && !(t[c] > 0) ? 0 : t[c];
        }
      }
    }
  }
}

#define ROWS_PER_ITEM 8

// Shares work on rows whose items are ROWS_PER_ITEM rows; few rows stay on the caller's thread.
static void share_rows(int64_t rows, Work work, void* job) {
  int64_t items = up(rows, ROWS_PER_ITEM);
  if (items > 2)
    share(items, work, job);
  else
    for (int64_t i = 0; i < items; i++) work(job, i, 0);
}

static void quantize_item(void* job, int64_t item, int slot) {
  const Input* p = job;
  for (int64_t r = item * ROWS_PER_ITEM; r < least((item + 1) * ROWS_PER_ITEM, p->rows); r++) {
    const float* x = p->x + r * p->k;
    uint8_t* q = p->q + r * p->k4 * 4;
    float top = 0;
    vec tops = {};
    int64_t i = 0;
    for (; i + LANES <= p->k; i += LANES) {
      vec v = *(const vec*)(x + i);
      tops = larger(tops, larger(v, -v));
    }
    for (; i < p->k; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    top = fmaxf(top, largest(tops));
    float inverse = top > 0 ? 127.0f / top : 0;
    i = 0;
#if defined(__AVX512F__)
    for (; i + LANES <= p->k; i += LANES) {
      __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(n, _mm512_set1_epi32(128)));
      _mm_storeu_si128((__m128i*)(q + i), bytes);
    }
#endif
    for (; i < p->k; i++) q[i] = (uint8_t)((int32_t)rintf(x[i] * inverse) + 128);
    for (; i < p->k4 * 4; i++) q[i] = 128;
    p->scale[r] = top / 127.0f;
  }
}

// Prepares rows (R, K) for products with matrices like w; 0 if memory has run out. `place` is
// QUANTIZED, or HIDDEN_QUANTIZED for rows that are in use at the same time.
static int prepare(Input* in, const float* x, int64_t rows, const Matrix* w, int place) {
  *in = (Input){.x = x, .rows = rows, .k = w->k, .k4 = w->k4};
  if (!w->quantized) return 1;
  in->q = scratch(place, rows * w->k4 * 4);
  in->scale = scratch(place + 1, rows * 4);
  if (!in->q || !in->scale) return 0;
  share_rows(rows, quantize_item, in);
  return 1;
}

#define ITEM_BYTES 32768  // of weights per item, if there are enough
#define CHUNK_ROWS 96     // rows that stay in the cache while panels are read

// y (R, N) <- rows of `in`, of which there are some, times w, plus bias; with ReLU if `relu`.
static Product product_of(const Input* in, const Matrix* w, int relu, float* y) {
  Product job = {.in = *in, .w = w, .y = y, .relu = relu};
  int64_t panels = up(w->n, PANEL), chunks = up(in->rows, CHUNK_ROWS);
  job.chunk = up(in->rows, chunks);
  job.group = most(1, least(ITEM_BYTES / w->panel_bytes, panels * chunks / (4 * n_threads())));
  job.groups = up(panels, job.group);
  job.items = job.groups * chunks;
  return job;
}

static void product(const Input* in, const Matrix* w, int relu, float* y) {
  if (!in->rows) return;
  Product job = product_of(in, w, relu, y);
  share(job.items, product_item, &job);
}

static void products_item(void* job, int64_t item, int slot) {
  Product* p = job;
  while (item >= p->items) item -= p++->items;
  product_item(p, item, slot);
}

// Several products as one job: their threads wait for each other once.
static void share_products(int64_t n, Product* jobs) {
  int64_t items = 0;
  for (int64_t i = 0; i < n; i++) items += jobs[i].items;
  share(items, products_item, jobs);
}

typedef struct {
  float* y;
  const float *x, *gamma, *beta;
  int64_t rows, d;
} AddNorm;

static void add_norm_item(void* job, int64_t item, int slot) {
  const AddNorm* p = job;
  for (int64_t r = item * ROWS_PER_ITEM; r < least((item + 1) * ROWS_PER_ITEM, p->rows); r++)
    add_norm_row(p->y + r * p->d, p->x + r * p->d, p->gamma, p->beta, p->d);
}

static void add_norm(AddNorm job) { share_rows(job.rows, add_norm_item, &job); }
