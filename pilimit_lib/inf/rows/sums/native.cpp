// The sums over rows of a π-layer for one block of rows: what native.py compiles and calls. No header but the compiler's own.
//
// Eight rows at a time go through all operations while they are in the first level of cache. While one matrix is worked on, the other
// one's rows are prefetched. Sums are float within FLUSH rows and double beyond. Two layouts:
//
// * many samples lie side by side in vectors (tiles of W = 16 or 32): a product broadcasts one entry of a row to all of them;
// * up to 8 samples (FEW) would fill half a vector, so there vectors run along the row, which is widened as it is loaded.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 8;
constexpr int FLUSH = 512;
constexpr float PI = 3.14159265358979f;

// Vectors are as wide as the registers, and the loops below hold no more of them than there are: 32 with AVX-512, else 16. One loop that
// needs more writes sums to memory and reads them back at every step, which made it ten times as slow.
#if defined(__AVX512F__)
constexpr int L = 16;
#else
constexpr int L = 8;
#endif
constexpr bool MANY_REGISTERS = L == 16;
typedef float vec __attribute__((vector_size(4 * L)));

// Tensors need not be aligned to a vector.
template <class V> inline V load(const float* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(float* to, V v) { std::memcpy(to, &v, sizeof v); }

// Interpolation at the nine Chebyshev points of [0, 1]; see triton_kernels.py, whose formulas these are.
constexpr float U[9] = {0.9999999997f, -0.07079627863f, 0.01880419623f, -0.007729034363f, 0.003909490657f, -0.002098884451f,
                        0.00100198718f, -0.0003385782616f, 5.61436905e-05f};
constexpr float P[9] = {1.570796323f, -0.2146011607f, 0.08903013694f, -0.05059357388f, 0.03257117017f, -0.02072766525f,
                        0.01102838067f, -0.003974577704f, 0.0006845318166f};
constexpr float S[9] = {1.000000004f, 0.4999992676f, -0.1249799748f, 0.06228427306f, -0.03786150625f, 0.02340367195f,
                        -0.01226585742f, 0.004385790411f, -0.0007521091842f};

inline float series(const float (&c)[9], float x) {
    float value = c[8];
    for (int i = 7; i >= 0; --i) value = value * x + c[i];
    return value;
}

inline float clamped(float q) { q = q > 1.f ? 1.f : q; return q < -1.f ? -1.f : q; }

enum Kind { F32, BF16, F16, I8 };
constexpr int BYTES[4] = {4, 2, 2, 1};

inline void widen(int kind, const char* from, float* to, int n) {
    if (kind == BF16) {
        const uint16_t* h = reinterpret_cast<const uint16_t*>(from);
        for (int i = 0; i < n; ++i) { uint32_t bits = uint32_t(h[i]) << 16; float x; std::memcpy(&x, &bits, 4); to[i] = x; }
    } else if (kind == I8) {
        const int8_t* c = reinterpret_cast<const int8_t*>(from);
        for (int i = 0; i < n; ++i) to[i] = float(c[i]);
    } else {
        int i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
#endif
        for (; i < n; ++i) {
            uint16_t h; std::memcpy(&h, from + 2 * i, 2);
            const int exponent = (h >> 10) & 31; const float mantissa = float(h & 1023);
            float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            to[i] = h & 0x8000 ? -x : x;
        }
    }
}

// Eight rows of one matrix as floats [8 n], in place where they are stored so; rows beyond the last one are zero.
inline const float* take(int kind, const char* base, long start, int count, int n, float* scratch) {
    const char* from = base + start * long(n) * BYTES[kind];
    if (kind == F32 && count == GROUP) return reinterpret_cast<const float*>(from);
    if (kind == F32) std::memcpy(scratch, from, sizeof(float) * n * count);
    else widen(kind, from, scratch, n * count);
    std::memset(scratch + long(n) * count, 0, sizeof(float) * n * (GROUP - count));
    return scratch;
}

// Where the rows lie that will be needed next.
struct Ahead {
    const char* base; long row_bytes; int rows; int bytes;

    inline void fetch(int i) const {
        const int at = i * bytes;
        if (at < row_bytes)
            for (int m = 0; m < rows; ++m) __builtin_prefetch(base + m * row_bytes + at);
    }
};

// Vectors of a tile that are worked on at once: eight sums each.
template <int N> constexpr int AT_ONCE = MANY_REGISTERS ? N : 1;

// q[m] = Σ_i rows[m][i] x[i], for rows [8 n] and x [n N] vectors.
template <int N>
inline void dots(const float* rows, const float* x, int n, float* q, const Ahead& ahead) {
    constexpr int K = AT_ONCE<N>;
    for (int first = 0; first < N; first += K) {
        vec sum[GROUP][K] = {};
        for (int begin = 0; begin < n; begin += 16) {
            if (first == 0) ahead.fetch(begin);
            const int end = begin + 16 < n ? begin + 16 : n;
            for (int i = begin; i < end; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < K; ++v) {
                    const vec here = load<vec>(x + (long(i) * N + first + v) * L);
#pragma GCC unroll 8
                    for (int m = 0; m < GROUP; ++m) sum[m][v] += rows[long(m) * n + i] * here;
                }
        }
        for (int m = 0; m < GROUP; ++m)
            for (int v = 0; v < K; ++v) store<vec>(q + (m * N + first + v) * L, sum[m][v]);
    }
}

// total[i] += Σ_m rows[m][i] w[m], for rows [8 n] and total [n N] vectors.
template <int N>
inline void outer(const float* rows, const float* w, int n, float* total, const Ahead& ahead) {
    constexpr int K = AT_ONCE<N>;
    for (int first = 0; first < N; first += K) {
        vec weight[GROUP][K];
        for (int m = 0; m < GROUP; ++m)
            for (int v = 0; v < K; ++v) weight[m][v] = load<vec>(w + (m * N + first + v) * L);
        for (int begin = 0; begin < n; begin += 16) {
            if (first == 0) ahead.fetch(begin);
            const int end = begin + 16 < n ? begin + 16 : n;
            for (int i = begin; i < end; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < K; ++v) {
                    float* here = total + (long(i) * N + first + v) * L;
                    vec sum = load<vec>(here);
#pragma GCC unroll 8
                    for (int m = 0; m < GROUP; ++m) sum += rows[long(m) * n + i] * weight[m][v];
                    store<vec>(here, sum);
                }
        }
    }
}

// Coefficients of eight rows, each repeated for all W samples, so that the loops below have no short inner one.
template <int W>
struct Coefficients {
    float weight[GROUP * W] = {}, offset[GROUP * W] = {}, scale[GROUP * W], shift[GROUP * W] = {};

    Coefficients() { for (float& x : scale) x = 1.f; }

    static void spread(const float* values, int count, float* to, float rest) {
        for (int m = 0; m < GROUP; ++m)
            for (int j = 0; j < W; ++j) to[m * W + j] = m < count ? values[m] : rest;
    }

    void take(const float* weights, const float* offsets, const float* scales, const float* shifts, long start, int count) {
        spread(weights + start, count, weight, 0.f);
        if (!scales) return;
        spread(offsets + start, count, offset, 0.f);
        spread(scales + start, count, scale, 1.f);
        spread(shifts + start, count, shift, 0.f);
    }
};

// The functions of the cosines of eight rows and W samples. Not inlined: arrays that may overlap would be gone through one by one.
template <int W>
__attribute__((noinline)) void cosine_of(float* __restrict q, const float* __restrict u_sum, const Coefficients<W>& __restrict c) {
    for (int m = 0; m < GROUP; ++m)
        for (int j = 0; j < W; ++j) q[m * W + j] = q[m * W + j] * c.scale[m * W + j] + u_sum[j] * c.shift[m * W + j];
}

template <int W>
__attribute__((noinline)) void kernel_of(float* __restrict q, float* __restrict shared, const Coefficients<W>& __restrict c) {
    for (int j = 0; j < GROUP * W; ++j) {
        const float cosine = clamped(q[j]), x = std::fabs(cosine), rest = 1.f - x;
        const float kernel = rest * std::sqrt(rest) * series(U, x) + PI * (cosine > 0.f ? cosine : 0.f);
        shared[j] += kernel * c.offset[j];
        q[j] = kernel * c.weight[j];
    }
}

template <int W>
__attribute__((noinline)) void slope_of(float* __restrict q, const float* __restrict d, const float* __restrict grad_sum,
                                        float* __restrict radial, float* __restrict shared,
                                        const Coefficients<W>& __restrict c) {
    float shifted[GROUP * W];
    for (int m = 0; m < GROUP; ++m)
        for (int j = 0; j < W; ++j) shifted[m * W + j] = grad_sum[j] * c.offset[m * W + j];
    for (int j = 0; j < GROUP * W; ++j) {
        const float cosine = clamped(q[j]), x = std::fabs(cosine), root = std::sqrt(1.f - x);
        const float dgamma = d[j] * c.weight[j] + shifted[j];
        const float arc = root * series(P, x), slope = (cosine > 0.f ? PI - arc : arc) * dgamma;
        radial[j] += root * series(S, x) * dgamma;
        shared[j] += slope * c.shift[j];
        q[j] = slope * c.scale[j];
    }
}

// Sums [tiles 8 W] over eight rows, added to `total` [tiles W].
template <int W>
inline void fold(std::vector<float>& part, double* total) {
    for (size_t i = 0; i < part.size(); ++i) {
        total[i / (GROUP * W) * W + i % W] += part[i];
        part[i] = 0.f;
    }
}

inline void flush(std::vector<float>& part, double* total) {
    for (size_t i = 0; i < part.size(); ++i) { total[i] += part[i]; part[i] = 0.f; }
}

struct Block {
    int kind; long rows; int r, o, tiles; const char *A, *B; const float *weight, *offset, *scale, *shift;

    Ahead ahead(const char* base, long start, int n) const {
        const long left = rows - start;
        const int count = left < 0 ? 0 : left < GROUP ? int(left) : GROUP;
        return {base + start * long(n) * BYTES[kind], long(n) * BYTES[kind], count, BYTES[kind]};
    }
};

template <int W>
void forward(const Block& k, const float* u, const float* u_sum, double* total, double* common) {
    constexpr int N = W / L;
    std::vector<float> part(long(k.tiles) * k.o * W), shared(k.tiles * GROUP * W), w(k.tiles * GROUP * W);
    std::vector<float> wide(GROUP * (k.r + k.o));
    Coefficients<W> c;
    for (long start = 0; start < k.rows; start += GROUP) {
        const int count = k.rows - start < GROUP ? int(k.rows - start) : GROUP;
        const float* B = take(k.kind, k.B, start, count, k.r, wide.data());
        c.take(k.weight, k.offset, k.scale, k.shift, start, count);
        for (int t = 0; t < k.tiles; ++t) {
            float* q = w.data() + t * GROUP * W;
            dots<N>(B, u + long(t) * k.r * W, k.r, q, k.ahead(k.A, t ? k.rows : start, k.o));
            if (k.scale) cosine_of<W>(q, u_sum + t * W, c);
            kernel_of<W>(q, shared.data() + t * GROUP * W, c);
        }
        const float* A = take(k.kind, k.A, start, count, k.o, wide.data() + GROUP * k.r);
        for (int t = 0; t < k.tiles; ++t)
            outer<N>(A, w.data() + t * GROUP * W, k.o, part.data() + long(t) * k.o * W,
                        k.ahead(k.B, t ? k.rows : start + GROUP, k.r));
        if ((start + GROUP) % FLUSH == 0 || start + GROUP >= k.rows) { flush(part, total); fold<W>(shared, common); }
    }
}

template <int W>
void backward(const Block& k, const float* u, const float* u_sum, const float* grad, const float* grad_sum, double* total,
              double* common, double* along_unit) {
    constexpr int N = W / L;
    std::vector<float> part(long(k.tiles) * k.r * W), w(k.tiles * GROUP * W), d(GROUP * W);
    std::vector<float> shared(k.tiles * GROUP * W), radial(k.tiles * GROUP * W), wide(GROUP * (k.r + k.o));
    Coefficients<W> c;
    for (long start = 0; start < k.rows; start += GROUP) {
        const int count = k.rows - start < GROUP ? int(k.rows - start) : GROUP;
        const float* B = take(k.kind, k.B, start, count, k.r, wide.data());
        c.take(k.weight, k.offset, k.scale, k.shift, start, count);
        for (int t = 0; t < k.tiles; ++t) {
            float* q = w.data() + t * GROUP * W;
            dots<N>(B, u + long(t) * k.r * W, k.r, q, k.ahead(k.A, t ? k.rows : start, k.o));
            if (k.scale) cosine_of<W>(q, u_sum + t * W, c);
        }
        const float* A = take(k.kind, k.A, start, count, k.o, wide.data() + GROUP * k.r);
        for (int t = 0; t < k.tiles; ++t) {
            float* q = w.data() + t * GROUP * W;
            dots<N>(A, grad + long(t) * k.o * W, k.o, d.data(), k.ahead(k.B, t ? k.rows : start + GROUP, k.r));
            slope_of<W>(q, d.data(), grad_sum + t * W, radial.data() + t * GROUP * W, shared.data() + t * GROUP * W, c);
            outer<N>(B, q, k.r, part.data() + long(t) * k.r * W, k.ahead(k.B, k.rows, k.r));
        }
        if ((start + GROUP) % FLUSH == 0 || start + GROUP >= k.rows) {
            flush(part, total); fold<W>(shared, common); fold<W>(radial, along_unit);
        }
    }
}

constexpr int FEW = 8;

// L entries of a stored row as floats.
template <int KIND>
inline vec entries(const char* from) {
    if constexpr (KIND == F32) return load<vec>(reinterpret_cast<const float*>(from));
    else if constexpr (KIND == BF16) {
        typedef uint16_t half __attribute__((vector_size(2 * L)));
        typedef uint32_t word __attribute__((vector_size(4 * L)));
        half h; std::memcpy(&h, from, sizeof h);
        const word bits = __builtin_convertvector(h, word) << 16;
        vec x; std::memcpy(&x, &bits, sizeof x); return x;
#if defined(__AVX512F__)
    } else if constexpr (KIND == I8) {
        return vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
    } else if constexpr (KIND == F16) {
        return vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__) && defined(__F16C__)
    } else if constexpr (KIND == I8) {
        return vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
    } else if constexpr (KIND == F16) {
        return vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
    } else {
        float x[L]; widen(KIND, from, x, L); return load<vec>(x);
    }
}

// The sums over lanes of as many vectors as there are lanes, as one vector: halves are folded together pair by pair.
inline vec lanes_summed(const vec* s) {
#if defined(__AVX512F__)
    vec a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = __builtin_shufflevector(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(s[2 * i], s[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    vec a[4], b[2];
    for (int i = 0; i < 4; ++i)
        a[i] = __builtin_shufflevector(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(s[2 * i], s[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; ++i)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15);
    return __builtin_shufflevector(b[0], b[1], 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(b[0], b[1], 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// Eight stored rows of n entries, and those of the other matrix that will be needed next.
template <int KIND>
struct Group {
    static constexpr int ROWS = L / FEW;  // rows whose products with eight samples fill one vector
    const char* at[GROUP]; Ahead next; int n; char end[GROUP][4 * L];

    // Rows beyond the last one are zero; so is what follows the last entries of a row, which are copied aside.
    Group(const char* base, long start, int count, int n, const char* zero, Ahead next) : next(next), n(n) {
        for (int m = 0; m < GROUP; ++m) {
            at[m] = m < count ? base + (start + m) * long(n) * BYTES[KIND] : zero;
            std::memset(end[m], 0, sizeof end[m]);
            std::memcpy(end[m], at[m] + n / L * L * BYTES[KIND], n % L * BYTES[KIND]);
        }
    }

    inline vec read(int m, int i) const { return entries<KIND>(i + L <= n ? at[m] + i * BYTES[KIND] : end[m]); }

    // q[m][s] = Σ_i rows[m][i] x[s][i], for x [FEW stride].
    void dots(const float* x, int stride, float* q) const {
        for (int m = 0; m < GROUP; m += ROWS) {
            const int left = next.rows > m ? next.rows - m : 0;
            const Ahead few{next.base + m * next.row_bytes, next.row_bytes, left < ROWS ? left : ROWS, next.bytes};
            vec sum[L] = {};
            for (int i = 0; i < n; i += L) {
                if (i % 16 == 0) few.fetch(i);
                vec row[ROWS];
                for (int k = 0; k < ROWS; ++k) row[k] = read(m + k, i);
#pragma GCC unroll 8
                for (int s = 0; s < FEW; ++s) {
                    const vec here = load<vec>(x + s * stride + i);
#pragma GCC unroll 2
                    for (int k = 0; k < ROWS; ++k) sum[k * FEW + s] += row[k] * here;
                }
            }
            store<vec>(q + m * FEW, lanes_summed(sum));
        }
    }

    // total[s][i] += Σ_m rows[m][i] w[m][s], for total [FEW stride].
    void outer(const float* w, int stride, float* total) const {
        for (int m = 0; m < GROUP; m += 4)
            for (int i = 0; i < n; i += L) {
                if (m == 0 && i % 16 == 0) next.fetch(i);
                const vec row[4] = {read(m, i), read(m + 1, i), read(m + 2, i), read(m + 3, i)};
#pragma GCC unroll 8
                for (int s = 0; s < FEW; ++s) {
                    vec sum = load<vec>(total + s * stride + i);
#pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k) sum += row[k] * w[(m + k) * FEW + s];
                    store<vec>(total + s * stride + i, sum);
                }
            }
    }
};

// Samples of few lie this far apart: a multiple of 16 on every processor.
inline int padded(int n) { return (n + 15) / 16 * 16; }

template <int KIND>
void few_forward(const Block& k, const float* u, const float* u_sum, double* total, double* common) {
    std::vector<float> part(FEW * padded(k.o)), shared(GROUP * FEW), q(GROUP * FEW);
    Coefficients<FEW> c;
    const std::vector<char> zero(4 * (k.r + k.o));
    for (long start = 0; start < k.rows; start += GROUP) {
        const int count = k.rows - start < GROUP ? int(k.rows - start) : GROUP;
        Group<KIND>(k.B, start, count, k.r, zero.data(), k.ahead(k.A, start, k.o)).dots(u, padded(k.r), q.data());
        c.take(k.weight, k.offset, k.scale, k.shift, start, count);
        if (k.scale) cosine_of<FEW>(q.data(), u_sum, c);
        kernel_of<FEW>(q.data(), shared.data(), c);
        Group<KIND>(k.A, start, count, k.o, zero.data(), k.ahead(k.B, start + GROUP, k.r)).outer(q.data(), padded(k.o), part.data());
        if ((start + GROUP) % FLUSH == 0 || start + GROUP >= k.rows) { flush(part, total); fold<FEW>(shared, common); }
    }
}

template <int KIND>
void few_backward(const Block& k, const float* u, const float* u_sum, const float* grad, const float* grad_sum, double* total,
                  double* common, double* along_unit) {
    std::vector<float> part(FEW * padded(k.r)), shared(GROUP * FEW), radial(GROUP * FEW), q(GROUP * FEW), d(GROUP * FEW);
    Coefficients<FEW> c;
    const std::vector<char> zero(4 * (k.r + k.o));
    for (long start = 0; start < k.rows; start += GROUP) {
        const int count = k.rows - start < GROUP ? int(k.rows - start) : GROUP;
        const Group<KIND> B(k.B, start, count, k.r, zero.data(), k.ahead(k.A, start, k.o));
        B.dots(u, padded(k.r), q.data());
        Group<KIND>(k.A, start, count, k.o, zero.data(), k.ahead(k.B, start + GROUP, k.r)).dots(grad, padded(k.o), d.data());
        c.take(k.weight, k.offset, k.scale, k.shift, start, count);
        if (k.scale) cosine_of<FEW>(q.data(), u_sum, c);
        slope_of<FEW>(q.data(), d.data(), grad_sum, radial.data(), shared.data(), c);
        B.outer(q.data(), padded(k.r), part.data());
        if ((start + GROUP) % FLUSH == 0 || start + GROUP >= k.rows) {
            flush(part, total); fold<FEW>(shared, common); fold<FEW>(radial, along_unit);
        }
    }
}

}  // namespace

// kind: 0 float32, 1 bfloat16, 2 float16, 3 int8 (only then offset, scale and shift are read). Samples are padded to tiles of W:
// u [tiles r W], u_sum [tiles W], total [tiles o W] and common [tiles W] are added to; likewise in the backward pass. With W = 8 the
// layout is that of few samples: u [8 r], total [8 o], with r and o padded by zeros to a multiple of 16.
extern "C" void pi_rows_forward(int kind, long rows, int r, int o, int tiles, int W, const char* A, const char* B, const float* weight,
                                const float* offset, const float* scale, const float* shift, const float* u, const float* u_sum,
                                double* total, double* common) {
    const Block k{kind, rows, r, o, tiles, A, B, weight, offset, scale, shift};
    if (W == FEW) {
        if (kind == F32) few_forward<F32>(k, u, u_sum, total, common);
        else if (kind == BF16) few_forward<BF16>(k, u, u_sum, total, common);
        else if (kind == F16) few_forward<F16>(k, u, u_sum, total, common);
        else few_forward<I8>(k, u, u_sum, total, common);
    } else if (W == 16) forward<16>(k, u, u_sum, total, common);
    else forward<32>(k, u, u_sum, total, common);
}

extern "C" void pi_rows_backward(int kind, long rows, int r, int o, int tiles, int W, const char* A, const char* B,
                                 const float* weight, const float* offset, const float* scale, const float* shift, const float* u,
                                 const float* u_sum, const float* grad, const float* grad_sum, double* total, double* common,
                                 double* along_unit) {
    const Block k{kind, rows, r, o, tiles, A, B, weight, offset, scale, shift};
    if (W == FEW) {
        if (kind == F32) few_backward<F32>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
        else if (kind == BF16) few_backward<BF16>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
        else if (kind == F16) few_backward<F16>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
        else few_backward<I8>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
    } else if (W == 16) backward<16>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
    else backward<32>(k, u, u_sum, grad, grad_sum, total, common, along_unit);
}
