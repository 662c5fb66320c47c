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
// LANES is the width of a register: gcc keeps wider vectors in memory, which is ten times slower.
// MOST_ROWS is the rows of a tile: as many as registers hold.
#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define MOST_ROWS 3
#else
#define LANES 4
#define MOST_ROWS 3
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "pool.h"
#include "memory.h"
#include "vectors.h"
#include "products.h"
#include "calls.h"
#include "experts.h"

// --- rows --------------------------------------------------------------------------------------

// rows: [n], ids (R), positions (R), words, table of positions (P, D) -> (R, D)
HANDLER(embed) {
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* rows = next(&a, S32, ANY);
  const int32_t *ids = rows->data, *positions = next(&a, S32, dim(rows, 0))->data;
  int in_panels = rank_of_next(&a) == 3;  // the table is the output layer too
  const XLA_FFI_Buffer* words = in_panels ? next(&a, F32, ANY, ANY, PANEL) : next(&a, F32, ANY, ANY);
  const XLA_FFI_Buffer* table = next(&a, F32, ANY, ANY);
  int64_t d = dim(table, 1), width = dim(words, 1), stride = in_panels ? PANEL : 1;
  float scale = sqrtf(d);
  float* y = result(&a, 0, F32, dim(rows, 0), d);
  need(&a, n <= dim(rows, 0) && d <= width);
  need_below(&a, ids, n, 0, dim(words, 0) * stride);
  need_below(&a, positions, n, 0, dim(table, 0));
  if (a.wrong) return wrong_sizes(f);
  for (int64_t r = 0; r < n; r++) {
    const float* p = (const float*)table->data + positions[r] * d;
    const float* w = (const float*)words->data + ids[r] / stride * width * stride + ids[r] % stride;
    for (int64_t i = 0; i < d; i++) y[r * d + i] = w[i * stride] * scale + p[i];
  }
  return NULL;
}

// [n], x (R, K), matrix with bias -> (R, N)
HANDLER(linear) {
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* x = next(&a, F32, ANY, ANY);
  int64_t outputs = result_columns(&a);
  float* y = result(&a, 0, F32, dim(x, 0), outputs);
  Matrix w = next_matrix(&a, dim(x, 1), outputs, 1);
  need(&a, n <= dim(x, 0));
  if (a.wrong) return wrong_sizes(f);
  Input in;
  if (!prepare(&in, x->data, n, &w, QUANTIZED)) return no_memory(f);
  product(&in, &w, 0, y);
  return NULL;
}

// [n], x (R, D), y (R, K), matrix with bias, gamma, beta -> LayerNorm(x + y W + b)
HANDLER(linear_add_norm) {
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer *x = next(&a, F32, ANY, ANY), *y = next(&a, F32, dim(x, 0), ANY);
  int64_t d = dim(x, 1);
  Matrix w = next_matrix(&a, dim(y, 1), d, 1);
  const float *gamma = next(&a, F32, d)->data, *beta = next(&a, F32, d)->data;
  float* z = result(&a, 0, F32, dim(x, 0), d);
  need(&a, n <= dim(x, 0));
  if (a.wrong) return wrong_sizes(f);
  Input in;
  if (!prepare(&in, y->data, n, &w, QUANTIZED)) return no_memory(f);
  product(&in, &w, 0, z);
  add_norm((AddNorm){z, x->data, gamma, beta, n, d});
  return NULL;
}

// --- attention ---------------------------------------------------------------------------------

typedef struct {
  const float* q;
  float* y;
  const float** keys;  // per segment (rows, stride); values follow `gap` floats later
  int64_t q_stride, stride, gap, segments, heads, width, queries;
  const int32_t *start, *length;  // per sentence
  const int32_t* sentence;        // of each group of `queries`; NULL for one query per word
} Attention;

// One head of one sentence.
static void attention_item(void* job, int64_t item, int slot) {
  const Attention* p = job;
  int64_t size = p->width / p->heads, head = item % p->heads, at = item / p->heads;
  int64_t s = p->sentence ? p->sentence[at] : at;
  int64_t start = p->start[s], length = p->length[s];
  int64_t n = p->sentence ? p->queries : length, first = p->sentence ? at * p->queries : start;
  int64_t total = length * p->segments;
  float scale = 1.0f / sqrtf(size);
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

// Needs the heads to divide the width, and each sentence to lie among the words.
static void need_attention(Arguments* a, const Attention* p, int64_t sentences, int64_t words) {
  need(a, p->heads > 0 && p->width % most(p->heads, 1) == 0);
  for (int64_t i = 0; !a->wrong && i < sentences; i++)
    need(a, p->start[i] >= 0 && p->length[i] >= 0 && p->length[i] * p->segments <= MOST_KEYS &&
                (int64_t)p->start[i] + p->length[i] <= words);
}

// starts (B), lengths (B), Q/K/V of all words (R, 3 Q) -> (R, Q)
HANDLER(encoder_attention) {
  const XLA_FFI_Buffer* start = next(&a, S32, ANY);
  const int32_t* length = next(&a, S32, dim(start, 0))->data;
  const XLA_FFI_Buffer* qkv = next(&a, F32, ANY, ANY);
  int64_t width = dim(qkv, 1) / 3;
  need(&a, dim(qkv, 1) % 3 == 0);
  const float* keys = (const float*)qkv->data + width;
  Attention job = {.q = qkv->data, .y = result(&a, 0, F32, dim(qkv, 0), width), .keys = &keys,
                   .q_stride = 3 * width, .stride = 3 * width, .gap = width, .segments = 1,
                   .heads = number(&a, "heads", 1), .width = width, .start = start->data,
                   .length = length};
  need_attention(&a, &job, dim(start, 0), dim(qkv, 0));
  if (a.wrong) return wrong_sizes(f);
  share(dim(start, 0) * job.heads, attention_item, &job);
  return NULL;
}

// [rows], sentence of each group of beams (B), starts (B), lengths (B), q (R, Q), then the keys and
// values (words, 2 Q) of each attended encoder layer -> (R, Q)
HANDLER(cross_attention) {
  int64_t rows = next_count(&a);
  const XLA_FFI_Buffer* sentence = next(&a, S32, ANY);
  int64_t sentences = dim(sentence, 0);
  const int32_t* start = next(&a, S32, sentences)->data;
  const int32_t* length = next(&a, S32, sentences)->data;
  const XLA_FFI_Buffer* q = next(&a, F32, ANY, ANY);
  int64_t width = dim(q, 1), beams = number(&a, "beams", 1), words = ANY;
  Attention job = {.q = q->data, .y = result(&a, 0, F32, dim(q, 0), width), .q_stride = width,
                   .stride = 2 * width, .gap = width, .heads = number(&a, "heads", 1),
                   .width = width, .start = start, .length = length, .sentence = sentence->data,
                   .queries = beams};
  const float* keys[most(f->args.size, 1)];
  for (job.segments = 0; a.at < f->args.size; job.segments++) {
    const XLA_FFI_Buffer* kv = next(&a, F32, words, 2 * width);
    words = dim(kv, 0);
    keys[job.segments] = kv->data;
  }
  job.keys = keys;
  need(&a, job.segments > 0 && rows <= dim(q, 0) && rows % beams == 0 && rows / beams <= sentences);
  need_below(&a, job.sentence, rows / beams, 0, sentences);
  need_attention(&a, &job, sentences, words);
  if (a.wrong) return wrong_sizes(f);
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
  const SelfAttention* p = job;
  int64_t w = p->width, size = w / p->heads, steps = p->step + 1;
  const int32_t* ancestor = p->ancestor + row * p->time;
  float scores[up(steps, LANES) * LANES];
  int64_t at[steps];  // of the keys and values of each step
  for (int64_t t = 0; t < steps; t++)
    at[t] = ((t == p->step ? row : ancestor[t]) * p->time + t) * w;
  float scale = 1.0f / sqrtf(size);
  for (int64_t h = 0; h < p->heads; h++) {
    const float* q = p->qkv + row * 3 * w + h * size;
    float* y = p->y + row * w + h * size;
    for (int64_t t = 0; t < steps; t++)
      scores[t] = scale * dot(q, p->keys + at[t] + h * size, size);
    softmax(scores, steps);
    memset(y, 0, size * 4);
    for (int64_t t = 0; t < steps; t++)
      add_scaled(y, scores[t], p->values + at[t] + h * size, size);
  }
}

// [rows], [step], ancestors (R, T), Q/K/V (R, 3 Q), keys (R, T, Q), values (R, T, Q)
// -> (R, Q), keys and values with this step's (in place)
HANDLER(self_attention) {
  int64_t rows = next_count(&a), step = next_count(&a);
  const XLA_FFI_Buffer *ancestor = next(&a, S32, ANY, ANY), *qkv = next(&a, F32, ANY, ANY);
  int64_t most_rows = dim(qkv, 0), width = dim(qkv, 1) / 3, time = dim(ancestor, 1);
  float* y = result(&a, 0, F32, most_rows, width);
  float* caches[2];
  for (int i = 0; i < 2; i++) {  // XLA may not have aliased the result to the argument
    const XLA_FFI_Buffer* old = next(&a, F32, most_rows, time, width);
    caches[i] = result(&a, 1 + i, F32, most_rows, time, width);
    if (!a.wrong && old->data != caches[i]) memcpy(caches[i], old->data, most_rows * time * width * 4);
  }
  SelfAttention job = {qkv->data, caches[0], caches[1], y, ancestor->data,
                       width, number(&a, "heads", 1), time, step};
  need(&a, dim(qkv, 1) % 3 == 0 && width % job.heads == 0 && step < time && step < MOST_KEYS);
  need(&a, rows <= most_rows && rows <= dim(ancestor, 0));
  for (int64_t r = 0; r < rows; r++) need_below(&a, job.ancestor + r * time, step, 0, most_rows);
  if (a.wrong) return wrong_sizes(f);
  for (int64_t r = 0; r < rows; r++) {
    memcpy(job.keys + (r * time + step) * width, job.qkv + r * 3 * width + width, width * 4);
    memcpy(job.values + (r * time + step) * width, job.qkv + r * 3 * width + 2 * width, width * 4);
  }
  share(rows, self_attention_item, &job);
  return NULL;
}

// --- output layer ------------------------------------------------------------------------------

#define PANELS_PER_PART 8
#define LOWEST -1e30f  // NEVER in decoding/xla_engine.py

// What the parts of the vocabulary find for each row; `merge` joins it.
typedef struct {
  int64_t words, candidates;
  int32_t barred[2];   // words that are never candidates, -1 for none
  int32_t only;        // the only word allowed, -1 for all
  float *top, *total;  // (cells): largest logit, sum of exponentials relative to it
  float* best;         // (lists, C), descending
  int32_t* word;
  float *logit_of_row, *log_sum_of_row;  // the results
  int32_t* word_of_row;
} Best;

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

static int is_barred(const Best* p, int32_t id) {
  return id == p->barred[0] || id == p->barred[1] || (p->only >= 0 && id != p->only);
}

static void clear(float* best, int32_t* word, int64_t n) {
  for (int64_t i = 0; i < n; i++) best[i] = LOWEST, word[i] = INT32_MAX;
}

// Reads the last arguments and the attributes of a call on `rows`; makes space for what parts find.
// `best` is NULL if memory has run out, or the call is wrong.
static Best next_best(Arguments* a, int64_t rows, int64_t cells, int64_t lists) {
  int64_t barred = next_count(a), only = next_count(a), eos = number(a, "eos", 0);
  int64_t n = result_columns(a);
  Best p = {.words = number(a, "words", 1), .candidates = n,
            .barred = {number(a, "pad", 0), barred ? eos : -1}, .only = only ? eos : -1,
            .logit_of_row = result(a, 0, F32, rows, n), .word_of_row = result(a, 1, S32, rows, n),
            .log_sum_of_row = result(a, 2, F32, rows)};
  need(a, n > 0);
  if (a->wrong) return p;
  p.top = scratch(PARTS, (cells + lists * n) * 8);
  if (!p.top) return p;
  p.total = p.top + cells;
  p.best = p.total + cells;
  p.word = (int32_t*)(p.best + lists * n);
  return p;
}

// Writes the results of a row, whose cells and lists are `first` and every `stride`th after it.
static void merge(const Best* p, int64_t row, int64_t first, int64_t stride, int64_t parts,
                  int64_t lists) {
  int64_t c = p->candidates;
  float *best = p->logit_of_row + row * c, m = -INFINITY;
  int32_t* word = p->word_of_row + row * c;
  clear(best, word, c);
  for (int64_t i = 0; i < lists; i++)
    for (int64_t at = (first + i * stride) * c, k = 0; k < c; k++)
      keep(best, word, c, p->best[at + k], p->word[at + k]);
  for (int64_t i = 0; i < c; i++) word[i] = least(word[i], p->words - 1);
  double total = 0;
  for (int64_t i = 0; i < parts; i++) m = fmaxf(m, p->top[first + i * stride]);
  for (int64_t i = 0; i < parts; i++) {
    int64_t at = first + i * stride;
    if (p->total[at] != 0) total += (double)p->total[at] * exp((double)(p->top[at] - m));
  }
  p->log_sum_of_row[row] = m + (float)log(total);
}

typedef struct {
  Input in;
  const Matrix* w;
  Best found;  // cells (parts, R), lists (threads, R)
} Output;

static void output_item(void* job, int64_t part, int slot) {
  const Output* o = job;
  const Best* p = &o->found;
  int64_t n = o->in.rows, c = p->candidates, panels = up(p->words, PANEL);
  int64_t from = part * PANELS_PER_PART, to = least(from + PANELS_PER_PART, panels);
  float *top = p->top + part * n, *total = p->total + part * n;
  for (int64_t r = 0; r < n; r++) top[r] = -INFINITY, total[r] = 0;
  float out[MOST_ROWS * PANEL];
  for (int64_t panel = from; panel < to; panel++) {
    int64_t column = panel * PANEL, columns = least(PANEL, p->words - column);
    for (int64_t at = 0, rows; at < n; at += rows) {
      rows = block_rows(at, n);
      tile(&o->in, o->w, panel, at, rows, out);
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
        for (int64_t i = 0; i < columns; i++)
          if (!is_barred(p, column + i)) keep(best, word, c, t[i], column + i);
      }
    }
  }
}

// [n], x (R, D), matrix (D, V), [whether eos is barred], [whether only eos is allowed]
// -> the best C logits of each row (R, C), descending; their words (R, C); log-sum-exp (R) of all
HANDLER(top_words) {
  int64_t n = next_count(&a);
  const XLA_FFI_Buffer* x = next(&a, F32, ANY, ANY);
  Matrix w = next_matrix(&a, dim(x, 1), number(&a, "words", 1), 0);
  int64_t parts = up(up(w.n, PANEL), PANELS_PER_PART), threads = automoe_threads();
  need(&a, n <= dim(x, 0));
  Output job = {.w = &w, .found = next_best(&a, dim(x, 0), n * parts, n * threads)};
  if (a.wrong) return wrong_sizes(f);
  if (!job.found.best || !prepare(&job.in, x->data, n, &w, QUANTIZED)) return no_memory(f);
  clear(job.found.best, job.found.word, n * threads * job.found.candidates);
  share(parts, output_item, &job);
  for (int64_t r = 0; r < n; r++) merge(&job.found, r, r, n, parts, threads);
  return NULL;
}

// --- output layer with a shortlist --------------------------------------------------------------

#define WORDS_PER_PART 64

typedef struct {
  const float *x, *table;
  const int32_t *list, *sentence;
  int64_t d, length, parts, beams;
  Best found;  // cells and lists (groups, parts, J)
} Listed;

// One part of the word list of a sentence, for all its beams.
static void listed_item(void* job, int64_t item, int slot) {
  const Listed* l = job;
  const Best* p = &l->found;
  int64_t group = item / l->parts, from = item % l->parts * WORDS_PER_PART, c = p->candidates;
  int64_t n = least(WORDS_PER_PART, l->length - from);
  const int32_t* list = l->list + l->sentence[group] * l->length + from;
  for (int64_t r = 0; r < l->beams; r++) {
    int64_t at = item * l->beams + r;
    const float* x = l->x + (group * l->beams + r) * l->d;
    float* best = p->best + at * c;
    int32_t* word = p->word + at * c;
    float logits[WORDS_PER_PART];
    clear(best, word, c);
    for (int64_t i = 0; i < WORDS_PER_PART; i++) {
      int32_t id = i < n ? list[i] : -1;
      logits[i] = -INFINITY;
      if (id < 0 || id >= p->words) continue;
      logits[i] = dot(x, l->table + id * l->d, l->d);
      if (!is_barred(p, id)) keep(best, word, c, logits[i], id);
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
HANDLER(top_listed) {
  int64_t n = next_count(&a), beams = number(&a, "beams", 1);
  const XLA_FFI_Buffer *sentence = next(&a, S32, ANY), *x = next(&a, F32, ANY, ANY);
  const XLA_FFI_Buffer *table = next(&a, F32, number(&a, "words", 1), dim(x, 1));
  const XLA_FFI_Buffer* list = next(&a, S32, ANY, ANY);
  int64_t length = dim(list, 1), parts = up(length, WORDS_PER_PART), groups = n / beams;
  need(&a, n <= dim(x, 0) && n % beams == 0 && groups <= dim(sentence, 0));
  need_below(&a, sentence->data, groups, 0, dim(list, 0));
  Listed job = {x->data, table->data, list->data, sentence->data, dim(x, 1), length, parts, beams,
                next_best(&a, dim(x, 0), n * parts, n * parts)};
  if (a.wrong) return wrong_sizes(f);
  if (!job.found.best) return no_memory(f);
  share(groups * parts, listed_item, &job);
  for (int64_t r = 0; r < n; r++)
    merge(&job.found, r, r / beams * parts * beams + r % beams, beams, parts, parts);
  return NULL;
}
