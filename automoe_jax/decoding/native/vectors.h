// Functions of SIMD vectors and of rows.

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

// In place; x has space up to a multiple of LANES.
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
