// Kernels of the CPU translator, called by XLA as custom calls.
//
// Letters: R rows, K inputs, N outputs, D embedding, Q query/key/value width, H heads, V words.
// A matrix (K, N) is stored in panels of PANEL columns: (ceil(N / PANEL), K, PANEL) as float, or
// (ceil(N / PANEL), ceil(K / 4), PANEL, 4) as int8 with a scale and a sum for each column. A panel
// is read once from front to end, which is what memory does best, and used for all rows.
//
// A row's result depends on that row alone: sums run over K in order, whatever the number of rows
// and threads.

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

#define PANEL 32
#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__AVX512F__) || defined(__aarch64__)
#define MOST_ROWS 8  // of a product at a time: as many as registers hold
#else
#define MOST_ROWS 3
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- threads -----------------------------------------------------------------------------------
//
// One job at a time is shared out item by item; whoever finds the pool taken works alone. Workers
// wait for the next job in a loop for a while before they sleep: products follow each other within
// microseconds, and waking a thread takes longer than many of them.

#define SPIN_NS 100000

typedef void (*Work)(void* job, int64_t item, int slot);

static struct {
  pthread_mutex_t taken, sleeping;
  pthread_cond_t awake;
  _Atomic(Work) work;
  _Atomic(void*) job;
  _Atomic int64_t items, done;
  _Atomic uint64_t next;  // generation << 32 | item
  _Atomic uint32_t generation;
  _Atomic int asleep;
  int threads;  // with the caller
} pool = {.taken = PTHREAD_MUTEX_INITIALIZER,
          .sleeping = PTHREAD_MUTEX_INITIALIZER,
          .awake = PTHREAD_COND_INITIALIZER};

static inline void rest(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void help(uint32_t generation, int slot) {
  Work work = atomic_load(&pool.work);
  void* job = atomic_load(&pool.job);
  int64_t items = atomic_load(&pool.items);
  uint64_t at = atomic_load(&pool.next);
  // A job that is over has another generation by now: the exchange fails and nothing is touched.
  while ((uint32_t)(at >> 32) == generation && (int64_t)(at & 0xffffffff) < items) {
    if (atomic_compare_exchange_weak(&pool.next, &at, at + 1)) {
      work(job, at & 0xffffffff, slot);
      atomic_fetch_add(&pool.done, 1);
      at = atomic_load(&pool.next);
    }
  }
}

static void* worker(void* argument) {
  int slot = (int)(intptr_t)argument;
  uint32_t seen = 0;
  for (;;) {
    int64_t since = nanoseconds();
    while (atomic_load(&pool.generation) == seen) {
      for (int i = 0; i < 64 && atomic_load(&pool.generation) == seen; i++) rest();
      if (nanoseconds() - since > SPIN_NS) {
        pthread_mutex_lock(&pool.sleeping);
        atomic_fetch_add(&pool.asleep, 1);
        while (atomic_load(&pool.generation) == seen)
          pthread_cond_wait(&pool.awake, &pool.sleeping);
        atomic_fetch_sub(&pool.asleep, 1);
        pthread_mutex_unlock(&pool.sleeping);
      }
    }
    seen = atomic_load(&pool.generation);
    help(seen, slot);
  }
  return NULL;
}

static int count_threads(void) {
  int n = 1;
#if defined(__linux__)
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) n = CPU_COUNT(&set);
#endif
  const char* limit = getenv("NPROC");  // what XLA's own pool obeys
  if (limit && atoi(limit) > 0 && atoi(limit) < n) n = atoi(limit);
  return n < 1 ? 1 : n > 64 ? 64 : n;
}

static void start_pool(void) {
  pool.threads = count_threads();
  for (int i = 1; i < pool.threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void*)(intptr_t)i)) {
      pool.threads = i;
      break;
    }
    pthread_detach(thread);
  }
}

static _Atomic int alone;  // callers that want each call on its own thread

static int n_threads(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, start_pool);
  return atomic_load(&alone) ? 1 : pool.threads;
}

// At least as many as slots that `share` hands out, whatever `alone` becomes meanwhile.
static int pool_threads(void) {
  n_threads();
  return pool.threads;
}

// Adds to the number of those who translate several batches at a time: while there are any, a call
// does not share its work.
__attribute__((visibility("default"))) void automoe_alone(int change) {
  atomic_fetch_add(&alone, change);
}

static void share(int64_t items, Work work, void* job) {
  if (items <= 1 || n_threads() == 1 || pthread_mutex_trylock(&pool.taken)) {
    for (int64_t i = 0; i < items; i++) work(job, i, 0);
    return;
  }
  uint32_t generation = atomic_load(&pool.generation) + 1;
  atomic_store(&pool.work, work);
  atomic_store(&pool.job, job);
  atomic_store(&pool.items, items);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.next, (uint64_t)generation << 32);
  atomic_store(&pool.generation, generation);
  if (atomic_load(&pool.asleep)) {
    pthread_mutex_lock(&pool.sleeping);
    pthread_cond_broadcast(&pool.awake);
    pthread_mutex_unlock(&pool.sleeping);
  }
  help(generation, 0);
  while (atomic_load(&pool.done) < items) rest();
  pthread_mutex_unlock(&pool.taken);
}

// --- memory of a call --------------------------------------------------------------------------

enum { QUANTIZED, SCALES, HIDDEN, RESULT, ROUTED, PARTS, N_SCRATCH };
static _Thread_local struct {
  void* at;
  size_t size;
} scratches[N_SCRATCH];

// Memory of this thread, kept for later calls; NULL where there is none.
static void* scratch(int which, size_t size) {
  if (scratches[which].size < size) {
    free(scratches[which].at);
    size = up(size + size / 4, 64) * 64;
    scratches[which].at = aligned_alloc(64, size);
    scratches[which].size = scratches[which].at ? size : 0;
  }
  return scratches[which].at;
}

// --- functions ---------------------------------------------------------------------------------

static inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  ivec mask = a > b;
  return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
#endif
}

// e^x to 2 units in the last place (Cody-Waite reduction, polynomial of degree 6).
static inline vec exponential(vec x) {
  x = larger(x, (vec){} - 87.0f);
  x = -larger(-x, (vec){} - 88.0f);
  vec magic = (vec){} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vec shifted = x * 1.44269504088896341f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = (vec){} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec bits = ((ivec)shifted - (ivec)magic) << 23;
  return (vec)((ivec)p + bits);
}

static inline float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < LANES; i++) s += x[i];
  return s;
#endif
}

static inline float largest(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float s = x[0];
  for (int i = 1; i < LANES; i++) s = x[i] > s ? x[i] : s;
  return s;
#endif
}

static float dot(const float* a, const float* b, int64_t n) {
  vec s = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) s += *(const vec*)(a + i) * *(const vec*)(b + i);
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return sum(s) + rest;
}

static void add_scaled(float* y, float p, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) *(vec*)(y + i) += p * *(const vec*)(x + i);
  for (; i < n; i++) y[i] += p * x[i];
}

// In place; x has room up to a multiple of LANES.
static void softmax(float* x, int64_t n) {
  for (int64_t i = n; i < up(n, LANES) * LANES; i++) x[i] = -1e30f;
  vec top = *(vec*)x;
  for (int64_t i = LANES; i < n; i += LANES) top = larger(top, *(vec*)(x + i));
  float m = largest(top);
  vec total = {};
  for (int64_t i = 0; i < n; i += LANES) {
    vec e = exponential(*(vec*)(x + i) - m);
    for (int64_t k = n - i; k < LANES; k++) e[k] = 0;
    *(vec*)(x + i) = e;
    total += e;
  }
  float scale = 1.0f / sum(total);
  for (int64_t i = 0; i < n; i += LANES) *(vec*)(x + i) *= scale;
}

// y <- LayerNorm(x + y)
static void add_norm_row(float* y, const float* x, const float* gamma, const float* beta,
                         int64_t d) {
  float mean = 0, variance = 0;
  vec s = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) s += *(vec*)(y + i) += *(const vec*)(x + i);
  for (; i < d; i++) mean += y[i] += x[i];
  mean = (mean + sum(s)) / d;
  s = (vec){};
  for (i = 0; i + LANES <= d; i += LANES) {
    vec c = *(vec*)(y + i) -= mean;
    s += c * c;
  }
  for (; i < d; i++) {
    y[i] -= mean;
    variance += y[i] * y[i];
  }
  float inverse = 1.0f / sqrtf((variance + sum(s)) / d + 1e-5f);
  for (i = 0; i + LANES <= d; i += LANES)
    *(vec*)(y + i) = *(vec*)(y + i) * inverse * *(const vec*)(gamma + i) + *(const vec*)(beta + i);
  for (; i < d; i++) y[i] = y[i] * inverse * gamma[i] + beta[i];
}

// --- products ----------------------------------------------------------------------------------

typedef struct {
  const void* kernel;
  const float* scale;   // of each column, where the kernel is int8
  const int32_t* total;  // of each column
  const float* bias;    // NULL for none
  int64_t k, k4, n, panel_bytes;
  int quantized;
} Matrix;

#define FLOAT_ROWS(R)                                                                          \
  static void float_rows_##R(const float* const* x, const float* w, int64_t k, float* tile) {  \
    vec a[R][2];                                                                               \
    for (int r = 0; r < R; r++) a[r][0] = a[r][1] = (vec){};                                   \
    for (int64_t i = 0; i < k; i++) {                                                          \
      vec w0 = *(const vec*)(w + i * PANEL), w1 = *(const vec*)(w + i * PANEL + LANES);        \
      __builtin_prefetch(w + i * PANEL + 1024);                                                \
      __builtin_prefetch(w + i * PANEL + 1024 + LANES);                                        \
      for (int r = 0; r < R; r++) {                                                            \
        a[r][0] += x[r][i] * w0;                                                               \
        a[r][1] += x[r][i] * w1;                                                               \
      }                                                                                        \
    }                                                                                          \
    for (int r = 0; r < R; r++) {                                                              \
      *(vec*)(tile + r * PANEL) = a[r][0];                                                     \
      *(vec*)(tile + r * PANEL + LANES) = a[r][1];                                             \
    }                                                                                          \
  }

// x in 1..255 is 128 more than the value meant; w in -127..127.
#if defined(__AVX512VNNI__)
// Sums are variables of their own, and the instruction is written out: with an array or the
// compiler's own function all sums are copied at every turn of the loop.
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
// Pairs of 16-bit products: the 8-bit instruction would saturate.
#define INT_ROWS(R)                                                                            \
  static void int_rows_##R(const uint8_t* const* x, const int8_t* w, int64_t k4, int32_t* tile) { \
    for (int r = 0; r < R; r++) {                                                              \
      __m256i a[8];                                                                            \
      for (int c = 0; c < 8; c++) a[c] = _mm256_setzero_si256();                               \
      for (int64_t i = 0; i < k4; i++) {                                                       \
        int32_t four;                                                                          \
        memcpy(&four, x[r] + 4 * i, 4);                                                        \
        __m256i s = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));                                \
        for (int c = 0; c < 8; c++) {                                                          \
          __m128i b = _mm_loadu_si128((const __m128i*)(w + i * 128 + c * 16));                 \
          a[c] = _mm256_add_epi32(a[c], _mm256_madd_epi16(s, _mm256_cvtepi8_epi16(b)));        \
        }                                                                                      \
      }                                                                                        \
      for (int c = 0; c < 8; c++) {                                                            \
        int32_t pairs[8];                                                                      \
        _mm256_storeu_si256((__m256i*)pairs, a[c]);                                            \
        for (int i = 0; i < 4; i++) tile[r * PANEL + 4 * c + i] = pairs[2 * i] + pairs[2 * i + 1]; \
      }                                                                                        \
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

// Rows of a product: floats, or bytes with a scale each.
typedef struct {
  const float* x;
  const int32_t* which;  // rows of x, NULL for the first ones
  const uint8_t* q;
  const float* scale;
  int64_t rows, k, k4;
} Input;

// One tile: `rows` rows from `first`, all columns of a panel, bias added.
static void tile(const Input* in, const Matrix* w, int64_t panel, int64_t first, int rows,
                 float* out) {
  const char* kernel = (const char*)w->kernel + panel * w->panel_bytes;
  int64_t column = panel * PANEL, columns = least(PANEL, w->n - column);
  if (!w->quantized) {
    const float* x[MOST_ROWS];
    for (int r = 0; r < rows; r++)
      x[r] = in->x + (in->which ? in->which[first + r] : first + r) * in->k;
    float_rows[rows](x, (const float*)kernel, w->k, out);
  } else {
    const uint8_t* x[MOST_ROWS];
    const float* scale[MOST_ROWS];
    int32_t sums[MOST_ROWS * PANEL];
    for (int r = 0; r < rows; r++) {
      int64_t row = in->which ? in->which[first + r] : first + r;
      x[r] = in->q + row * in->k4 * 4;
      scale[r] = in->scale + row;
    }
    int_rows[rows](x, (const int8_t*)kernel, w->k4, sums);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < PANEL; c += LANES) {
        ivec s = *(ivec*)(sums + r * PANEL + c) - 128 * *(const ivec*)(w->total + column + c);
        *(vec*)(out + r * PANEL + c) =
            __builtin_convertvector(s, vec) * (*scale[r] * *(const vec*)(w->scale + column + c));
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
  int64_t group, groups, chunk;
} Product;

static void product_item(void* job, int64_t item, int slot) {
  (void)slot;
  const Product* p = job;
  int64_t panels = up(p->w->n, PANEL);
  int64_t from = item % p->groups * p->group, to = least(from + p->group, panels);
  int64_t first = item / p->groups * p->chunk, end = least(first + p->chunk, p->in.rows);
  float out[MOST_ROWS * PANEL];
  for (int64_t panel = from; panel < to; panel++) {
    int64_t column = panel * PANEL, columns = least(PANEL, p->w->n - column);
    for (int64_t at = first; at < end;) {
      int rows = block_rows(at, end);
      tile(&p->in, p->w, panel, at, rows, out);
      for (int r = 0; r < rows; r++) {
        float* y = p->y + (at + r) * p->w->n + column;
        const float* t = out + r * PANEL;
        if (columns == PANEL) {
          vec a = *(const vec*)t, b = *(const vec*)(t + LANES);
          if (p->relu) a = larger(a, (vec){}), b = larger(b, (vec){});
          *(vec*)y = a;
          *(vec*)(y + LANES) = b;
        } else {
          for (int64_t c = 0; c < columns; c++) y[c] = p->relu && !(t[c] > 0) ? 0 : t[c];
        }
      }
      at += rows;
    }
  }
}

typedef struct {
  const float* x;
  int64_t k, k4, rows;
  uint8_t* q;
  float* scale;
} Quantize;

#define ROWS_PER_ITEM 8

static void quantize_item(void* job, int64_t item, int slot) {
  (void)slot;
  const Quantize* p = job;
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

// Prepares rows (R, K) for products with matrices like w; 0 where memory has run out.
static int prepare(Input* in, const float* x, int64_t rows, const Matrix* w) {
  *in = (Input){.x = x, .rows = rows, .k = w->k, .k4 = w->k4};
  if (!w->quantized) return 1;
  uint8_t* q = scratch(QUANTIZED, rows * w->k4 * 4);
  float* scale = scratch(SCALES, rows * 4);
  if (!q || !scale) return 0;
  Quantize job = {x, w->k, w->k4, rows, q, scale};
  if (rows <= 2 * ROWS_PER_ITEM)
    for (int64_t i = 0; i < up(rows, ROWS_PER_ITEM); i++) quantize_item(&job, i, 0);
  else
    share(up(rows, ROWS_PER_ITEM), quantize_item, &job);
  in->q = q;
  in->scale = scale;
  return 1;
}

#define ITEM_BYTES 32768  // of weights, where there are enough of them
#define CHUNK_ROWS 96     // rows that stay in the cache while panels pass

// y (R, N) <- rows of `in` times w, plus bias; relu where asked for.
static void product(const Input* in, const Matrix* w, int relu, float* y) {
  if (!in->rows) return;
  Product job = {.in = *in, .w = w, .y = y, .relu = relu};
  int64_t panels = up(w->n, PANEL), chunks = up(in->rows, CHUNK_ROWS);
  job.chunk = up(in->rows, chunks);
  int64_t wanted = most(1, ITEM_BYTES / w->panel_bytes);
  int64_t most_group = most(1, panels * chunks / (4 * n_threads()));
  job.group = least(wanted, most_group);
  job.groups = up(panels, job.group);
  share(job.groups * chunks, product_item, &job);
}

typedef struct {
  float* y;
  const float *x, *gamma, *beta;
  int64_t rows, d;
} AddNorm;

static void add_norm_item(void* job, int64_t item, int slot) {
  (void)slot;
  const AddNorm* p = job;
  for (int64_t r = item * ROWS_PER_ITEM; r < least((item + 1) * ROWS_PER_ITEM, p->rows); r++)
    add_norm_row(p->y + r * p->d, p->x + r * p->d, p->gamma, p->beta, p->d);
}

static void add_norm(AddNorm job) {
  if (job.rows <= 2 * ROWS_PER_ITEM)
    for (int64_t i = 0; i < up(job.rows, ROWS_PER_ITEM); i++) add_norm_item(&job, i, 0);
  else
    share(up(job.rows, ROWS_PER_ITEM), add_norm_item, &job);
}

// --- calls -------------------------------------------------------------------------------------

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

// Takes kernel, scale and total where it is int8, and bias where wanted; k inputs, n outputs.
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

static XLA_FFI_Error* failure(XLA_FFI_CallFrame* f, const char* message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return f->api->XLA_FFI_Error_Create(&args);
}
#define NO_MEMORY(f) failure(f, "the translator's kernels have run out of memory")

// What XLA asks a handler before the first call; returns whether this was such a question.
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

#define HANDLER(name) __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame* f)

// rows: [n], ids (R), positions (R), words, table of positions (P, D) -> (R, D)
HANDLER(automoe_embed) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  const int32_t* ids = next_data(&a);
  const int32_t* positions = next_data(&a);
  const XLA_FFI_Buffer* words = next(&a);
  const XLA_FFI_Buffer* table = next(&a);
  int64_t d = dim(table, 1);
  float scale = sqrtf(d);
  float* y = result(f, 0);
  for (int64_t r = 0; r < n; r++) {
    const float* p = (const float*)table->data + positions[r] * d;
    const float* w = words->data;
    int64_t stride = 1, id = ids[r];
    if (words->rank == 3) {  // panels of the output layer
      w += id / PANEL * dim(words, 1) * PANEL + id % PANEL;
      stride = PANEL;
    } else {
      w += id * dim(words, 1);
    }
    for (int64_t i = 0; i < d; i++) y[r * d + i] = w[i * stride] * scale + p[i];
  }
  return NULL;
}

// [n], x (R, K), matrix with bias -> (R, N)
HANDLER(automoe_linear) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* x = next(&a);
  const XLA_FFI_Buffer* y = f->rets.rets[0];
  Matrix w = next_matrix(&a, dim(x, 1), dim(y, 1), 1);
  Input in;
  if (!prepare(&in, x->data, n, &w)) return NO_MEMORY(f);
  product(&in, &w, 0, y->data);
  return NULL;
}

// [n], x (R, D), y (R, K), matrix with bias, gamma, beta -> LayerNorm(x + y W + b)
HANDLER(automoe_linear_add_norm) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* x = next(&a);
  const XLA_FFI_Buffer* y = next(&a);
  int64_t d = dim(x, 1);
  Matrix w = next_matrix(&a, dim(y, 1), d, 1);
  const float* gamma = next_data(&a);
  const float* beta = next_data(&a);
  Input in;
  if (!prepare(&in, y->data, n, &w)) return NO_MEMORY(f);
  product(&in, &w, 0, result(f, 0));
  add_norm((AddNorm){result(f, 0), x->data, gamma, beta, n, d});
  return NULL;
}

// --- attention ---------------------------------------------------------------------------------

#define MOST_SEGMENTS 8

typedef struct {
  const float* q;
  float* y;
  const float* keys[MOST_SEGMENTS];  // (rows, stride), values `gap` floats behind
  int64_t q_stride, stride, gap, segments, heads, width, queries;
  const int32_t *start, *length, *sentence;  // of sentences
  int per_sentence;                          // as many queries for each; else one for each row
} Attention;

// One head of one sentence.
static void attention_item(void* job, int64_t item, int slot) {
  (void)slot;
  const Attention* p = job;
  int64_t size = p->width / p->heads, head = item % p->heads, at = item / p->heads;
  int64_t s = p->sentence ? p->sentence[at] : at;
  int64_t start = p->start[s], length = p->length[s];
  int64_t n = p->per_sentence ? p->queries : length;
  int64_t first = p->per_sentence ? at * p->queries : start;
  float scale = 1.0f / sqrtf(size);
  int64_t total = length * p->segments;
  float scores[up(total, LANES) * LANES];
  for (int64_t i = 0; i < n; i++) {
    const float* q = p->q + (first + i) * p->q_stride + head * size;
    float* y = p->y + (first + i) * p->width + head * size;
    for (int64_t g = 0; g < p->segments; g++) {
      const float* k = p->keys[g] + start * p->stride + head * size;
      for (int64_t m = 0; m < length; m++)
        scores[g * length + m] = scale * dot(q, k + m * p->stride, size);
    }
    softmax(scores, total);
    memset(y, 0, size * 4);
    for (int64_t g = 0; g < p->segments; g++) {
      const float* v = p->keys[g] + p->gap + start * p->stride + head * size;
      for (int64_t m = 0; m < length; m++)
        add_scaled(y, scores[g * length + m], v + m * p->stride, size);
    }
  }
}

// starts (B), lengths (B), Q/K/V of all words (R, 3 Q) -> (R, Q)
HANDLER(automoe_encoder_attention) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  const XLA_FFI_Buffer* start = next(&a);
  const int32_t* length = next_data(&a);
  const XLA_FFI_Buffer* qkv = next(&a);
  int64_t width = dim(qkv, 1) / 3;
  Attention job = {.q = qkv->data, .y = result(f, 0), .q_stride = 3 * width, .stride = 3 * width,
                   .gap = width, .segments = 1, .heads = number(f, "heads"), .width = width,
                   .start = start->data, .length = length};
  job.keys[0] = (const float*)qkv->data + width;
  share(dim(start, 0) * job.heads, attention_item, &job);
  return NULL;
}

// [rows], sentence of each group of beams (B), starts (B), lengths (B), q (R, Q), then the keys and
// values (words, 2 Q) of each attended encoder layer -> (R, Q)
HANDLER(automoe_cross_attention) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t rows = next_count(&a);
  const int32_t* sentence = next_data(&a);
  const int32_t* start = next_data(&a);
  const int32_t* length = next_data(&a);
  const XLA_FFI_Buffer* q = next(&a);
  int64_t width = dim(q, 1), beams = number(f, "beams");
  Attention job = {.q = q->data, .y = result(f, 0), .q_stride = width, .stride = 2 * width,
                   .gap = width, .heads = number(f, "heads"), .width = width, .start = start,
                   .length = length, .sentence = sentence, .queries = beams, .per_sentence = 1};
  for (job.segments = 0; a.at < f->args.size; job.segments++)
    job.keys[job.segments] = next_data(&a);
  share(rows / beams * job.heads, attention_item, &job);
  return NULL;
}

typedef struct {
  const float* qkv;
  float *keys, *values, *y;
  const int32_t* ancestor;
  int64_t width, heads, time, step;
} SelfAttention;

// One row.
static void self_attention_item(void* job, int64_t row, int slot) {
  (void)slot;
  const SelfAttention* p = job;
  int64_t w = p->width, size = w / p->heads, steps = p->step + 1;
  const int32_t* ancestor = p->ancestor + row * p->time;
  float scores[up(steps, LANES) * LANES];
  float scale = 1.0f / sqrtf(size);
  for (int64_t h = 0; h < p->heads; h++) {
    const float* q = p->qkv + row * 3 * w + h * size;
    float* y = p->y + row * w + h * size;
    for (int64_t t = 0; t < steps; t++) {
      int64_t own = t == p->step ? row : ancestor[t];
      scores[t] = scale * dot(q, p->keys + (own * p->time + t) * w + h * size, size);
    }
    softmax(scores, steps);
    memset(y, 0, size * 4);
    for (int64_t t = 0; t < steps; t++) {
      int64_t own = t == p->step ? row : ancestor[t];
      add_scaled(y, scores[t], p->values + (own * p->time + t) * w + h * size, size);
    }
  }
}

// [rows], [step], ancestors (R, T), Q/K/V (R, 3 Q), keys (R, T, Q), values (R, T, Q)
// -> (R, Q), keys and values with this step's (in place)
HANDLER(automoe_self_attention) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t rows = next_count(&a), step = next_count(&a);
  const XLA_FFI_Buffer* ancestor = next(&a);
  const XLA_FFI_Buffer* qkv = next(&a);
  int64_t width = dim(qkv, 1) / 3, time = dim(ancestor, 1);
  SelfAttention job = {qkv->data, result(f, 1), result(f, 2), result(f, 0), ancestor->data,
                       width, number(f, "heads"), time, step};
  for (int i = 0; i < 2; i++) {  // XLA may have given other memory than the argument's
    const XLA_FFI_Buffer* old = next(&a);
    int64_t size = dim(old, 0) * dim(old, 1) * dim(old, 2) * 4;
    if (old->data != result(f, 1 + i)) memcpy(result(f, 1 + i), old->data, size);
  }
  for (int64_t r = 0; r < rows; r++) {
    memcpy(job.keys + (r * time + step) * width, job.qkv + r * 3 * width + width, width * 4);
    memcpy(job.values + (r * time + step) * width, job.qkv + r * 3 * width + 2 * width, width * 4);
  }
  share(rows, self_attention_item, &job);
  return NULL;
}

// --- experts -----------------------------------------------------------------------------------

typedef struct {
  const float *x, *kernel, *bias;  // kernel (D, E)
  int64_t rows, d, experts, top_k;
  int32_t* expert;  // (R, top_k)
  float* p;
} Route;

static void route_item(void* job, int64_t item, int slot) {
  (void)slot;
  const Route* j = job;
  float p[up(j->experts, LANES) * LANES];
  for (int64_t r = item * ROWS_PER_ITEM; r < least((item + 1) * ROWS_PER_ITEM, j->rows); r++) {
    for (int64_t e = 0; e < j->experts; e++) p[e] = 0;
    for (int64_t i = 0; i < j->d; i++)
      for (int64_t e = 0; e < j->experts; e++)
        p[e] += j->x[r * j->d + i] * j->kernel[i * j->experts + e];
    for (int64_t e = 0; e < j->experts; e++) p[e] += j->bias[e];
    softmax(p, j->experts);
    for (int64_t k = 0; k < j->top_k; k++) {
      int64_t best = 0;
      for (int64_t e = 1; e < j->experts; e++) best = p[e] > p[best] ? e : best;
      j->expert[r * j->top_k + k] = best;
      j->p[r * j->top_k + k] = p[best];
      p[best] = -1;
    }
  }
}

// [n], x (R, D), router (D, E) and bias where there are several experts, then of each expert that
// is not the identity fc1 and fc2 with bias, gamma, beta -> LayerNorm(x + experts(x))
//
// Rows go to their experts in groups: weights of an expert without rows are not read.
HANDLER(automoe_experts_add_norm) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* input = next(&a);
  const float* x = input->data;
  float* y = result(f, 0);
  int64_t d = dim(input, 1), top_k = number(f, "top_k");
  const XLA_FFI_Array* sizes_attribute = attribute(f, "sizes");
  const int64_t* sizes = sizes_attribute->data;
  int64_t experts = sizes_attribute->size, largest_size = 0;
  for (int64_t e = 0; e < experts; e++) largest_size = most(largest_size, sizes[e]);
  Route route = {.x = x, .rows = n, .d = d, .experts = experts, .top_k = top_k};
  int32_t* list = NULL;
  float* out = y;
  if (experts > 1) {
    route.kernel = next_data(&a);
    route.bias = next_data(&a);
    char* memory = scratch(ROUTED, n * (top_k * 8 + 4 + 8));
    out = scratch(RESULT, most(n, 1) * d * 4);
    if (!memory || !out) return NO_MEMORY(f);
    route.expert = (int32_t*)memory;
    route.p = (float*)(route.expert + n * top_k);
    list = (int32_t*)(route.p + n * top_k);
    if (n <= 2 * ROWS_PER_ITEM)
      for (int64_t i = 0; i < up(n, ROWS_PER_ITEM); i++) route_item(&route, i, 0);
    else
      share(up(n, ROWS_PER_ITEM), route_item, &route);
    memset(y, 0, n * d * 4);
  }
  Input all = {.x = x, .rows = n, .k = d};
  for (int64_t e = 0; e < experts; e++) {
    int64_t rows = n;
    if (experts > 1) {
      rows = 0;
      for (int64_t r = 0; r < n; r++)
        for (int64_t k = 0; k < top_k; k++)
          if (route.expert[r * top_k + k] == e) list[rows++] = r;
    }
    if (sizes[e]) {
      Matrix fc1 = next_matrix(&a, d, sizes[e], 1), fc2 = next_matrix(&a, sizes[e], d, 1);
      if (!rows) continue;
      Input in = all, hidden;
      // Once for each expert: what quantising x leaves, that of the hidden rows overwrites.
      if (!prepare(&in, x, n, &fc1)) return NO_MEMORY(f);
      in.rows = rows;
      in.which = list;
      float* h = scratch(HIDDEN, rows * sizes[e] * 4);
      if (!h) return NO_MEMORY(f);
      product(&in, &fc1, 1, h);
      if (!prepare(&hidden, h, rows, &fc2)) return NO_MEMORY(f);
      product(&hidden, &fc2, 0, out);
    }
    for (int64_t i = 0; i < rows; i++) {
      int64_t r = list ? list[i] : i;
      if (!list) {
        if (!sizes[e]) memcpy(y + r * d, x + r * d, d * 4);
        continue;
      }
      float p = 0;
      for (int64_t k = 0; k < top_k; k++)
        if (route.expert[r * top_k + k] == e) p = route.p[r * top_k + k];
      add_scaled(y + r * d, p, sizes[e] ? out + i * d : x + r * d, d);
    }
  }
  const float* gamma = next_data(&a);
  const float* beta = next_data(&a);
  add_norm((AddNorm){y, x, gamma, beta, n, d});
  return NULL;
}

// --- output layer ------------------------------------------------------------------------------

#define PANELS_PER_PART 8
#define LOWEST -1e30f  // decoding.beam.NEVER

typedef struct {
  Input in;
  const Matrix* w;
  int64_t candidates;
  int32_t barred[2];  // words, -1 for none
  int32_t only;       // the only word allowed, -1 for all
  float *top, *total;  // (parts, R): largest logit, sum of exponentials relative to it
  float* best;         // (threads, R, C), falling
  int32_t* word;
} Output;

static inline int before(float a, int32_t i, float b, int32_t j) { return a > b || (a == b && i < j); }

// Keeps the best of a list that is in order; equal ones by number.
static void keep(float* best, int32_t* word, int64_t n, float value, int32_t id) {
  if (!before(value, id, best[n - 1], word[n - 1])) return;
  int64_t at = n - 1;
  for (; at > 0 && before(value, id, best[at - 1], word[at - 1]); at--) {
    best[at] = best[at - 1];
    word[at] = word[at - 1];
  }
  best[at] = value;
  word[at] = id;
}

static void output_item(void* job, int64_t part, int slot) {
  const Output* p = job;
  int64_t n = p->in.rows, c = p->candidates, panels = up(p->w->n, PANEL);
  int64_t from = part * PANELS_PER_PART, to = least(from + PANELS_PER_PART, panels);
  float* top = p->top + part * n;
  float* total = p->total + part * n;
  for (int64_t r = 0; r < n; r++) top[r] = -INFINITY, total[r] = 0;
  float out[MOST_ROWS * PANEL];
  for (int64_t panel = from; panel < to; panel++) {
    int64_t column = panel * PANEL, columns = least(PANEL, p->w->n - column);
    for (int64_t at = 0; at < n;) {
      int rows = block_rows(at, n);
      tile(&p->in, p->w, panel, at, rows, out);
      for (int r = 0; r < rows; r++) {
        float* t = out + r * PANEL;
        for (int64_t i = columns; i < PANEL; i++) t[i] = -INFINITY;
        vec t0 = *(vec*)t, t1 = *(vec*)(t + LANES);
        float m = largest(larger(t0, t1));
        int64_t row = at + r;
        if (m > top[row]) {
          vec difference = (vec){} + (top[row] - m);
          total[row] *= exponential(difference)[0];
          top[row] = m;
        }
        vec e = exponential(t0 - top[row]) + exponential(t1 - top[row]);
        total[row] += sum(e);
        float* best = p->best + (slot * n + row) * c;
        int32_t* word = p->word + (slot * n + row) * c;
        if (m < best[c - 1] && p->only < 0) continue;
        for (int64_t i = 0; i < columns; i++) {
          int32_t id = column + i;
          if (id == p->barred[0] || id == p->barred[1] || (p->only >= 0 && id != p->only)) continue;
          keep(best, word, c, t[i], id);
        }
      }
      at += rows;
    }
  }
}

// [n], x (R, D), matrix (D, V), [whether eos is barred], [whether only eos is allowed]
// -> the best C logits of each row (R, C), falling; their words (R, C); log-sum-exp (R) of all
HANDLER(automoe_top_words) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* x = next(&a);
  int64_t c = dim(f->rets.rets[0], 1), eos = number(f, "eos");
  Matrix w = next_matrix(&a, dim(x, 1), number(f, "words"), 0);
  int64_t barred = next_count(&a), only = next_count(&a);
  int64_t parts = up(up(w.n, PANEL), PANELS_PER_PART), threads = pool_threads();
  Output job = {.w = &w, .candidates = c};
  float* memory = scratch(PARTS, most(n, 1) * (2 * parts + 2 * threads * c) * 4);
  if (!memory || !prepare(&job.in, x->data, n, &w)) return NO_MEMORY(f);
  job.barred[0] = number(f, "pad");
  job.barred[1] = barred ? eos : -1;
  job.only = only ? eos : -1;
  job.top = memory;
  job.total = job.top + n * parts;
  job.best = job.total + n * parts;
  job.word = (int32_t*)(job.best + n * threads * c);
  for (int64_t i = 0; i < n * threads * c; i++) job.best[i] = LOWEST, job.word[i] = w.n;
  share(parts, output_item, &job);
  float* best = result(f, 0);
  int32_t* word = result(f, 1);
  float* log_sum = result(f, 2);
  for (int64_t r = 0; r < n; r++) {
    for (int64_t i = 0; i < c; i++) best[r * c + i] = LOWEST, word[r * c + i] = w.n;
    for (int64_t i = 0; i < threads * c; i++) {
      int64_t at = (i / c * n + r) * c + i % c;
      keep(best + r * c, word + r * c, c, job.best[at], job.word[at]);
    }
    for (int64_t i = 0; i < c; i++) word[r * c + i] = least(word[r * c + i], w.n - 1);
    float m = -INFINITY;
    double total = 0;
    for (int64_t i = 0; i < parts; i++) m = fmaxf(m, job.top[i * n + r]);
    for (int64_t i = 0; i < parts; i++)
      total += (double)job.total[i * n + r] * exp((double)(job.top[i * n + r] - m));
    log_sum[r] = m + (float)log(total);
  }
  return NULL;
}
