// Kernels of the translator for CPUs, called by XLA as custom calls.
//
// Letters: R rows, K inputs, N outputs, D embedding, Q query/key/value width, H heads, V words.
// A matrix (K, N) is stored in panels of PANEL columns: (ceil(N / PANEL), K, PANEL) as float, or
// (ceil(N / PANEL), ceil(K / 4), PANEL, 4) as int8 with a scale and a sum per column. A panel is read
// once, sequentially, and used for all rows.
//
// A row's result depends on that row alone: sums run over K in order for every number of rows and
// threads.

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

#define PANEL 32
// The width of a register: gcc keeps wider vectors in memory, which is ten times slower.
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__AVX512F__)
#define MOST_ROWS 8  // rows of a tile: as many as registers hold
#else
#define MOST_ROWS 3
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "pool.h"
#include "memory.h"
#include "vectors.h"
#include "products.h"
#include "calls.h"

// --- rows --------------------------------------------------------------------------------------

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
  if (!prepare(&in, x->data, n, &w, QUANTIZED)) return NO_MEMORY(f);
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
  if (!prepare(&in, y->data, n, &w, QUANTIZED)) return NO_MEMORY(f);
  product(&in, &w, 0, result(f, 0));
  add_norm((AddNorm){result(f, 0), x->data, gamma, beta, n, d});
  return NULL;
}

// --- attention ---------------------------------------------------------------------------------

typedef struct {
  const float* q;
  float* y;
  const float** keys;  // per segment (rows, stride); values follow `gap` floats later
  int64_t q_stride, stride, gap, segments, heads, width, queries;
  const int32_t *start, *length, *sentence;  // per sentence
  int per_sentence;                          // `queries` for each sentence; else one for each word
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
  if (!n || !total) return;
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
  const float* keys = (const float*)qkv->data + width;
  job.keys = &keys;
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
  const float* keys[f->args.size];
  for (job.segments = 0; a.at < f->args.size; job.segments++)
    keys[job.segments] = next_data(&a);
  job.keys = keys;
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
  for (int i = 0; i < 2; i++) {  // XLA may not have aliased the result to the argument
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

// [n], x (R, D), router (D, E) and its bias if there are several experts, fc1 and fc2 with bias of
// each expert that is not the identity, gamma, beta -> LayerNorm(x + experts(x))
//
// Rows are grouped by expert; the weights of an expert without rows are not read.
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
  int64_t experts = sizes_attribute->size;
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
  Input all = {.rows = 0};  // x, prepared at the first expert that is not the identity
  for (int64_t e = 0; e < experts; e++) {
    int64_t rows = n;
    if (experts > 1) {
      rows = 0;
      for (int64_t r = 0; r < n; r++)
        for (int64_t k = 0; k < top_k; k++)
          if (route.expert[r * top_k + k] == e) {
            list[rows++] = r;
            break;
          }
    }
    if (sizes[e]) {
      Matrix fc1 = next_matrix(&a, d, sizes[e], 1), fc2 = next_matrix(&a, sizes[e], d, 1);
      if (!rows) continue;
      Input in, hidden;
      if (!all.rows && !prepare(&all, x, n, &fc1, QUANTIZED)) return NO_MEMORY(f);
      in = all;
      in.rows = rows;
      in.which = list;
      float* h = scratch(HIDDEN, rows * sizes[e] * 4);
      if (!h) return NO_MEMORY(f);
      product(&in, &fc1, 1, h);
      if (!prepare(&hidden, h, rows, &fc2, HIDDEN_QUANTIZED)) return NO_MEMORY(f);
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
#define LOWEST -1e30f  // NEVER in decoding/xla_engine.py

typedef struct {
  Input in;
  const Matrix* w;
  int64_t candidates;
  int32_t barred[2];  // words that are never candidates, -1 for none
  int32_t only;       // the only word allowed, -1 for all
  float *top, *total;  // (parts, R): largest logit, sum of exponentials relative to it
  float* best;         // (threads, R, C), descending
  int32_t* word;
} Output;

static inline int before(float a, int32_t i, float b, int32_t j) { return a > b || (a == b && i < j); }

// Inserts into a descending list if good enough; equal values are ordered by id.
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
        vec tops = *(vec*)t, sums = {};
        for (int i = LANES; i < PANEL; i += LANES) tops = larger(tops, *(vec*)(t + i));
        float m = largest(tops);
        int64_t row = at + r;
        if (m > top[row]) {
          vec difference = (vec){} + (top[row] - m);
          total[row] *= exponential(difference)[0];
          top[row] = m;
        }
        for (int i = 0; i < PANEL; i += LANES) sums += exponential(*(vec*)(t + i) - top[row]);
        total[row] += sum(sums);
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
// -> the best C logits of each row (R, C), descending; their words (R, C); log-sum-exp (R) of all
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
  if (!memory || !prepare(&job.in, x->data, n, &w, QUANTIZED)) return NO_MEMORY(f);
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

// --- output layer with a shortlist --------------------------------------------------------------

#define WORDS_PER_PART 64

typedef struct {
  const float *x, *table;
  const int32_t *list, *sentence;
  int64_t d, length, parts, beams, candidates;
  int32_t barred[2], only;
  float *top, *total;  // (groups, parts, J)
  float* best;         // (groups, parts, J, C), descending
  int32_t* word;
} Listed;

// One part of the word list of a sentence, for all its beams.
static void listed_item(void* job, int64_t item, int slot) {
  (void)slot;
  const Listed* p = job;
  int64_t group = item / p->parts, from = item % p->parts * WORDS_PER_PART, c = p->candidates;
  int64_t n = least(WORDS_PER_PART, p->length - from);
  const int32_t* list = p->list + p->sentence[group] * p->length + from;
  for (int64_t r = 0; r < p->beams; r++) {
    int64_t at = item * p->beams + r;
    const float* x = p->x + (group * p->beams + r) * p->d;
    float* best = p->best + at * c;
    int32_t* word = p->word + at * c;
    float logits[WORDS_PER_PART];
    for (int64_t i = 0; i < c; i++) best[i] = LOWEST, word[i] = INT32_MAX;
    for (int64_t i = 0; i < WORDS_PER_PART; i++) {
      int32_t id = i < n ? list[i] : -1;
      logits[i] = -INFINITY;
      if (id < 0) continue;
      logits[i] = dot(x, p->table + id * p->d, p->d);
      int barred = id == p->barred[0] || id == p->barred[1] || (p->only >= 0 && id != p->only);
      if (!barred) keep(best, word, c, logits[i], id);
    }
    vec tops = *(vec*)logits, sums = {};
    for (int64_t i = LANES; i < WORDS_PER_PART; i += LANES) tops = larger(tops, *(vec*)(logits + i));
    p->top[at] = largest(tops);
    p->total[at] = 0;
    if (p->top[at] == -INFINITY) continue;
    for (int64_t i = 0; i < WORDS_PER_PART; i += LANES)
      sums += exponential(*(vec*)(logits + i) - p->top[at]);
    p->total[at] = sum(sums);
  }
}

// [n], sentence of each group of beams (B), x (R, D), table (V, D), words that each sentence may use
// (B, L), -1 for none, [whether eos is barred], [whether only eos is allowed] -> as automoe_top_words
HANDLER(automoe_top_listed) {
  if (answered(f)) return NULL;
  Arguments a = {.frame = f};
  int64_t n = next_count(&a);
  Listed job = {.sentence = next_data(&a), .beams = number(f, "beams")};
  const XLA_FFI_Buffer* x = next(&a);
  job.x = x->data;
  job.d = dim(x, 1);
  job.table = next_data(&a);
  const XLA_FFI_Buffer* list = next(&a);
  job.list = list->data;
  job.length = dim(list, 1);
  int64_t barred = next_count(&a), only = next_count(&a), eos = number(f, "eos");
  int64_t c = dim(f->rets.rets[0], 1), words = number(f, "words");
  job.candidates = c;
  job.barred[0] = number(f, "pad");
  job.barred[1] = barred ? eos : -1;
  job.only = only ? eos : -1;
  job.parts = up(job.length, WORDS_PER_PART);
  int64_t groups = n / job.beams, cells = groups * job.parts * job.beams;
  float* memory = scratch(PARTS, cells * (2 + 2 * c) * 4);
  if (!memory) return NO_MEMORY(f);
  job.top = memory;
  job.total = job.top + cells;
  job.best = job.total + cells;
  job.word = (int32_t*)(job.best + cells * c);
  share(groups * job.parts, listed_item, &job);
  float* best = result(f, 0);
  int32_t* word = result(f, 1);
  float* log_sum = result(f, 2);
  for (int64_t r = 0; r < n; r++) {
    int64_t first = r / job.beams * job.parts * job.beams + r % job.beams;
    float m = -INFINITY;
    double total = 0;
    for (int64_t i = 0; i < c; i++) best[r * c + i] = LOWEST, word[r * c + i] = INT32_MAX;
    for (int64_t i = 0; i < job.parts; i++) {
      int64_t at = first + i * job.beams;
      m = fmaxf(m, job.top[at]);
      for (int64_t k = 0; k < c; k++)
        keep(best + r * c, word + r * c, c, job.best[at * c + k], job.word[at * c + k]);
    }
    for (int64_t i = 0; i < job.parts; i++) {
      int64_t at = first + i * job.beams;
      if (job.total[at] > 0) total += (double)job.total[at] * exp((double)(job.top[at] - m));
    }
    for (int64_t i = 0; i < c; i++) word[r * c + i] = least(word[r * c + i], words - 1);
    log_sum[r] = m + (float)log(total);
  }
  return NULL;
}
