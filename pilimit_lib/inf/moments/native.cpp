// Φ(u) V, its input gradient and the update of V for polynomials of degree 2 at most: what native.py compiles and calls.
//
// Index legend: b samples, r rank in, o rank out, P monomials, B = b padded by zeros to whole vectors. Monomials are in the order of
// dual/features.py: 1, then u_i, then u_i u_{i+d} by distance d = 0 ... r/2, where the row of d = r/2 is half as long for even r.
//
// Φ is made for BLOCK monomials at a time, [BLOCK B], and stays in the first level of cache. Whatever is summed stays in registers
// meanwhile: as many sums as there are registers for, 32 with AVX-512 and 16 without.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;
#else
constexpr int L = 8;
#endif
constexpr bool MANY_REGISTERS = L == 16;
typedef float vec __attribute__((vector_size(4 * L)));
typedef float vec8 __attribute__((vector_size(32)));

constexpr int BLOCK = 128;
constexpr int AHEAD = 16;                      // monomials whose rows of V are fetched before they are needed
constexpr int SIDE = MANY_REGISTERS ? 8 : 4;   // samples, or monomials, whose sums are in registers
constexpr int ALONG = 3;                       // times so many vectors of columns

template <class V> inline V load(const float* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(float* to, V v) { std::memcpy(to, &v, sizeof v); }

// The first n of a vector's entries, the others zero: the last columns of V.
#if defined(__AVX512F__)
inline vec load_some(const float* from, int n) { return vec(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from)); }
inline void store_some(float* to, vec v, int n) { _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), __m512(v)); }
#elif defined(__AVX2__)
inline __m256i first(int n) {
    static const int ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 8 - n));
}
inline vec load_some(const float* from, int n) { return vec(_mm256_maskload_ps(from, first(n))); }
inline void store_some(float* to, vec v, int n) { _mm256_maskstore_ps(to, first(n), __m256(v)); }
#else
inline vec load_some(const float* from, int n) { vec v = {}; std::memcpy(&v, from, sizeof(float) * n); return v; }
inline void store_some(float* to, vec v, int n) { std::memcpy(to, &v, sizeof(float) * n); }
#endif

// Directions transposed and twice below one another, so that u_{i+d} is a row further on: [2r B].
struct Directions {
    int r, b, B;
    std::vector<float> twice;

    Directions(const float* u, int r, int b, int B) : r(r), b(b), B(B), twice(long(2) * r * B) {
        for (int s = 0; s < b; ++s)
            for (int i = 0; i < r; ++i) twice[long(i) * B + s] = twice[long(i + r) * B + s] = u[long(s) * r + i];
    }

    const float* at(int i) const { return twice.data() + long(i) * B; }
};

// The polynomial's monomials [begin, end) as runs of one kind: degree, distance and first index. `root` are the √κ of each degree.
struct Monomials {
    int r; float root[3];

    // call(kind, offset in the block, index i, distance d, length), kind 0, 1 or 2 for the degree
    template <class F>
    void runs(long begin, long end, F call) const {
        long at = 0;
        const auto run = [&](int degree, int distance, long length) {
            const long first = std::max(begin, at), last = std::min(end, at + length);
            if (first < last) call(degree, int(first - begin), int(first - at), distance, int(last - first));
            at += length;
        };
        if (root[0] > 0) run(0, 0, 1);
        if (root[1] > 0) run(1, 0, r);
        if (root[2] > 0) {
            const long start = at;
            const int full = (r + 1) / 2;
            // runs before `begin` are passed over at once
            const int d0 = begin > start ? int(std::min<long>((begin - start) / r, full)) : 0;
            at = start + long(d0) * r;
            for (int d = d0; d < full && at < end; ++d) run(2, d, r);
            if (r % 2 == 0 && at < end) run(2, full, r / 2);
        }
    }

    float factor(int degree, int distance) const { return degree == 2 && distance ? root[2] * 1.41421356237309515f : root[degree]; }

    void fill(const Directions& u, long begin, long end, float* phi) const {
        runs(begin, end, [&](int degree, int offset, int i, int d, int length) {
            const float f = factor(degree, d);
            float* to = phi + long(offset) * u.B;
            const long n = long(length) * u.B;
            if (degree == 0) for (long k = 0; k < n; ++k) to[k] = f;
            else if (degree == 1) for (long k = 0; k < n; ++k) to[k] = f * u.at(i)[k];
            else for (long k = 0; k < n; ++k) to[k] = f * u.at(i)[k] * u.at(i + d)[k];
        });
    }
};

// sum[s][v] over monomials of φ[p][s] V[p][columns]; the last of N vectors may have only `some` columns.
template <int N, bool SOME>
inline void products(const float* phi, int B, const float* V, int o, int count, int samples, float* out, int some) {
    vec sum[SIDE][N] = {};
    for (int p = 0; p < count; ++p) {
        const float* row = V + long(p) * o;
        for (int v = 0; v < N; ++v) __builtin_prefetch(row + long(AHEAD) * o + v * L);
        vec here[N];
        for (int v = 0; v < N; ++v) here[v] = SOME && v == N - 1 ? load_some(row + v * L, some) : load<vec>(row + v * L);
        const float* f = phi + long(p) * B;
#pragma GCC unroll 8
        for (int s = 0; s < SIDE; ++s)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) sum[s][v] += f[s] * here[v];
    }
    for (int s = 0; s < samples; ++s)
        for (int v = 0; v < N; ++v)
            for (int k = 0; k < (SOME && v == N - 1 ? some : L); ++k) out[long(s) * o + v * L + k] += sum[s][v][k];
}

// V[p][columns] ← decay V + Σ_s φ[p][s] δ[s][columns] for SIDE monomials; where decay is 0 V is not read.
template <int N, bool SOME>
inline void updated(const float* phi, int B, float* V, int o, int rows, const float* delta, int samples, float decay, int some) {
    vec sum[SIDE][N] = {};
    for (int m = 0; m < SIDE; ++m)
        for (int v = 0; v < N; ++v) __builtin_prefetch(V + (long(AHEAD) + m) * o + v * L, 1);
    if (decay != 0)
        for (int m = 0; m < rows; ++m)
            for (int v = 0; v < N; ++v) {
                const float* from = V + long(m) * o + v * L;
                sum[m][v] = decay * (SOME && v == N - 1 ? load_some(from, some) : load<vec>(from));
            }
    for (int s = 0; s < samples; ++s) {
        vec here[N];
        for (int v = 0; v < N; ++v) {
            const float* from = delta + long(s) * o + v * L;
            here[v] = SOME && v == N - 1 ? load_some(from, some) : load<vec>(from);
        }
#pragma GCC unroll 8
        for (int m = 0; m < SIDE; ++m)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) sum[m][v] += phi[long(m) * B + s] * here[v];
    }
    for (int m = 0; m < rows; ++m)
        for (int v = 0; v < N; ++v)
            if (SOME && v == N - 1) store_some(V + long(m) * o + v * L, sum[m][v], some);
            else store<vec>(V + long(m) * o + v * L, sum[m][v]);
}

// Columns in groups of ALONG vectors, then fewer, then what fills no vector: call(first column, vectors, entries of the last one).
template <class F>
void columns(int o, F call) {
    int j = 0;
    for (; j + ALONG * L <= o; j += ALONG * L) call(j, ALONG, L);
    const int rest = o - j, vectors = (rest + L - 1) / L;
    if (rest) call(j, vectors, rest - (vectors - 1) * L);
}

#define BY_COLUMNS(function, vectors, some, ...)                                                  \
    do {                                                                                          \
        if ((some) == L) {                                                                        \
            if ((vectors) == 3) function<3, false>(__VA_ARGS__, L);                               \
            else if ((vectors) == 2) function<2, false>(__VA_ARGS__, L);                          \
            else function<1, false>(__VA_ARGS__, L);                                              \
        } else {                                                                                  \
            if ((vectors) == 3) function<3, true>(__VA_ARGS__, some);                             \
            else if ((vectors) == 2) function<2, true>(__VA_ARGS__, some);                        \
            else function<1, true>(__VA_ARGS__, some);                                            \
        }                                                                                         \
    } while (0)

// dφ[p][samples] = Σ_j V[p][j] ∂out[j][samples] for R monomials and N vectors of samples; ∂out is transposed, [o B].
template <class X, int R, int N>
inline void adjoint_products(const float* V, int o, const float* grad, int B, float* dphi) {
    constexpr int W = sizeof(X) / 4;
    X sum[R][N] = {};
    for (int j = 0; j < o; ++j) {
        if (j % 16 == 0)
            for (int m = 0; m < R; ++m) __builtin_prefetch(V + long(m + R) * o + j);
        X here[N];
        for (int v = 0; v < N; ++v) here[v] = load<X>(grad + long(j) * B + v * W);
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) sum[m][v] += V[long(m) * o + j] * here[v];
    }
    for (int m = 0; m < R; ++m)
        for (int v = 0; v < N; ++v) store<X>(dphi + long(m) * B + v * W, sum[m][v]);
}

template <class X, int R, int N>
inline void adjoint_rows(const float* V, int o, const float* grad, int B, int count, float* dphi) {
    int p = 0;
    for (; p + R <= count; p += R) {
        adjoint_products<X, R, N>(V + long(p) * o, o, grad, B, dphi + long(p) * B);
    }
    for (; p < count; ++p) adjoint_products<X, 1, N>(V + long(p) * o, o, grad, B, dphi + long(p) * B);
}

inline int padded(int b) { const int w = b <= 8 ? 8 : L; return (b + w - 1) / w * w; }

// body(number, first, last) for a stretch of P monomials per thread, this one among them.
template <class F>
void stretches(int threads, long P, F body) {
    std::vector<std::thread> others;
    const auto part = [&body, threads, P](int n) { body(n, P * n / threads, P * (n + 1) / threads); };
    for (int n = 1; n < threads; ++n) {
        try { others.emplace_back(part, n); }
        catch (const std::system_error&) { part(n); }  // no more threads to be had
    }
    part(0);
    for (std::thread& other : others) other.join();
}

// Like stretches, where every body adds to a sum of its own; added to `out` [size] in the order of the monomials.
template <class F>
void summed(int threads, long P, float* out, long size, F body) {
    std::vector<float> more(size * (threads - 1));
    stretches(threads, P, [&](int n, long first, long last) { body(first, last, n ? more.data() + size * (n - 1) : out); });
    for (int n = 1; n < threads; ++n)
        for (long k = 0; k < size; ++k) out[k] += more[size * (n - 1) + k];
}

// out [b o] += Φ(u) V over the monomials [begin, end). u [b r], V [P o].
void forward(const Monomials& monomials, int o, int b, long begin, long end, const float* u, const float* V, float* out) {
    const int B = (padded(b) + SIDE - 1) / SIDE * SIDE;
    const Directions directions(u, monomials.r, b, B);
    std::vector<float> phi(long(BLOCK) * B);
    for (long p = begin; p < end; p += BLOCK) {
        const int count = int(std::min<long>(BLOCK, end - p));
        monomials.fill(directions, p, p + count, phi.data());
        columns(o, [&](int j, int vectors, int some) {
            for (int s = 0; s < b; s += SIDE)
                BY_COLUMNS(products, vectors, some, phi.data() + s, B, V + p * o + j, o, count, std::min(SIDE, b - s),
                           out + long(s) * o + j);
        });
    }
}

// V ← decay V + Φ(u)ᵀ δ over the monomials [begin, end), δ [b o]; where decay is 0 V is written only.
void update(const Monomials& monomials, int o, int b, long begin, long end, const float* u, float* V, const float* delta,
            float decay) {
    const int B = padded(b);
    const Directions directions(u, monomials.r, b, B);
    std::vector<float> phi(long(BLOCK + SIDE) * B);
    for (long p = begin; p < end; p += BLOCK) {
        const int count = int(std::min<long>(BLOCK, end - p));
        monomials.fill(directions, p, p + count, phi.data());
        columns(o, [&](int j, int vectors, int some) {
            for (int m = 0; m < count; m += SIDE)
                BY_COLUMNS(updated, vectors, some, phi.data() + long(m) * B, B, V + (p + m) * o + j, o, std::min(SIDE, count - m),
                           delta + j, b, decay);
        });
    }
}

// du [b r] += ∂L/∂u for ∂out `grad` [b o], over the monomials [begin, end).
void adjoint(const Monomials& monomials, int o, int b, long begin, long end, const float* u, const float* V, const float* grad,
             float* du) {
    const int r = monomials.r, B = padded(b);
    const Directions directions(u, r, b, B);
    std::vector<float> transposed(long(o) * B), dphi(long(BLOCK) * B), twice(long(2) * r * B);
    for (int s = 0; s < b; ++s)
        for (int j = 0; j < o; ++j) transposed[long(j) * B + s] = grad[long(s) * o + j];
    for (long p = begin; p < end; p += BLOCK) {
        const int count = int(std::min<long>(BLOCK, end - p));
        const float* block = V + p * o;
        int s = 0;
        if (B == 8) adjoint_rows<vec8, 8, 1>(block, o, transposed.data(), B, count, dphi.data());
        else {
            for (; s + 2 * L <= B; s += 2 * L)
                adjoint_rows<vec, MANY_REGISTERS ? 8 : 6, 2>(block, o, transposed.data() + s, B, count, dphi.data() + s);
            if (s < B) adjoint_rows<vec, 8, 1>(block, o, transposed.data() + s, B, count, dphi.data() + s);
        }
        monomials.runs(p, p + count, [&](int degree, int offset, int i, int d, int length) {
            if (degree == 0) return;
            const float f = monomials.factor(degree, d);
            const float* from = dphi.data() + long(offset) * B;
            const long n = long(length) * B;
            float* one = twice.data() + long(i) * B;
            if (degree == 1) { for (long k = 0; k < n; ++k) one[k] += f * from[k]; return; }
            float* other = twice.data() + long(i + d) * B;
            const float *u_one = directions.at(i), *u_other = directions.at(i + d);
            for (long k = 0; k < n; ++k) one[k] += f * from[k] * u_other[k];
            for (long k = 0; k < n; ++k) other[k] += f * from[k] * u_one[k];
        });
    }
    for (int s = 0; s < b; ++s)
        for (int i = 0; i < r; ++i) du[long(s) * r + i] += twice[long(i) * B + s] + twice[long(i + r) * B + s];
}

}  // namespace

// out [b o] += Φ(u) V. u [b r], V [P o].
extern "C" void pi_moments_forward(int threads, int r, int o, int b, float k0, float k1, float k2, long P, const float* u,
                                   const float* V, float* out) {
    const Monomials monomials{r, {k0, k1, k2}};
    summed(threads, P, out, long(b) * o,
           [&](long first, long last, float* part) { forward(monomials, o, b, first, last, u, V, part); });
}

// du [b r] += ∂L/∂u for ∂out `grad` [b o].
extern "C" void pi_moments_backward(int threads, int r, int o, int b, float k0, float k1, float k2, long P, const float* u,
                                    const float* V, const float* grad, float* du) {
    const Monomials monomials{r, {k0, k1, k2}};
    summed(threads, P, du, long(b) * r,
           [&](long first, long last, float* part) { adjoint(monomials, o, b, first, last, u, V, grad, part); });
}

// V ← decay V + scale Φ(u)ᵀ δ; where decay is 0 V is written only.
extern "C" void pi_moments_update(int threads, int r, int o, int b, float k0, float k1, float k2, long P, const float* u, float* V,
                                  const float* delta, float scale, float decay) {
    const Monomials monomials{r, {k0, k1, k2}};
    std::vector<float> scaled(delta, delta + long(b) * o);
    for (float& x : scaled) x *= scale;
    stretches(threads, P,
              [&](int, long first, long last) { update(monomials, o, b, first, last, u, V, scaled.data(), decay); });
}

// A layer of moments: out = a Φ(ĝ) V + bias with a = s = ‖g‖, or under layer norm 1 (0 where s is 0). g [b r], bias [o] or null,
// already times its multiplier. Kept for the way back: ĝ in u [b r], s [b], and Φ(ĝ) V in sum [b o], which is 0 at first.
extern "C" void pi_moments_layer(int threads, int r, int o, int b, float k0, float k1, float k2, long P, const float* g,
                                 const float* V, const float* bias, float alpha, int layernorm, float* u, float* s, float* sum,
                                 float* out) {
    for (int n = 0; n < b; ++n) {
        const float* from = g + long(n) * r;
        float square = 0;
        for (int i = 0; i < r; ++i) square += from[i] * from[i];
        s[n] = std::sqrt(square);
        const float by = s[n] > 0 ? s[n] : 1.f;
        for (int i = 0; i < r; ++i) u[long(n) * r + i] = from[i] / by;
    }
    pi_moments_forward(threads, r, o, b, k0, k1, k2, P, u, V, sum);
    for (int n = 0; n < b; ++n) {
        const float a = layernorm ? float(s[n] > 0) : s[n];
        for (int j = 0; j < o; ++j) {
            const float value = a * sum[long(n) * o + j];
            out[long(n) * o + j] = bias ? value + alpha * bias[j] : value;
        }
    }
}

// The way back through a layer for ∂out `grad` [b o]: the factor of V's gradient in delta [b o], ∂Φ(ĝ)V; dg [b r], 0 at first, or
// null; and dbias [o] or null.
extern "C" void pi_moments_layer_backward(int threads, int r, int o, int b, float k0, float k1, float k2, long P, const float* u,
                                          const float* V, const float* s, const float* sum, const float* grad, float alpha,
                                          int layernorm, float* delta, float* dg, float* dbias) {
    for (int n = 0; n < b; ++n) {
        const float a = layernorm ? float(s[n] > 0) : s[n];
        for (int j = 0; j < o; ++j) delta[long(n) * o + j] = a * grad[long(n) * o + j];
    }
    if (dbias)
        for (int j = 0; j < o; ++j) {
            float total = 0;
            for (int n = 0; n < b; ++n) total += grad[long(n) * o + j];
            dbias[j] = alpha * total;
        }
    if (!dg) return;
    pi_moments_backward(threads, r, o, b, k0, k1, k2, P, u, V, delta, dg);
    for (int n = 0; n < b; ++n) {
        float along = 0, ds = 0;
        const float* unit = u + long(n) * r;
        float* du = dg + long(n) * r;
        for (int i = 0; i < r; ++i) along += du[i] * unit[i];
        if (!layernorm)
            for (int j = 0; j < o; ++j) ds += grad[long(n) * o + j] * sum[long(n) * o + j];
        const float by = s[n] > 0 ? s[n] : 1.f;
        for (int i = 0; i < r; ++i) du[i] = (du[i] - along * unit[i]) / by + ds * unit[i];
    }
}

// The Frobenius norm of Φ(u)ᵀ δ, from the kernel: (Σ_nm δ_n·δ_m k(u_n·u_m))^½. δ [b o].
extern "C" float pi_moments_norm(int r, int o, int b, float k0, float k1, float k2, const float* u, const float* delta) {
    double total = 0;
    for (int n = 0; n < b; ++n)
        for (int m = 0; m <= n; ++m) {
            float c = 0, inner = 0;
            for (int i = 0; i < r; ++i) c += u[long(n) * r + i] * u[long(m) * r + i];
            for (int j = 0; j < o; ++j) inner += delta[long(n) * o + j] * delta[long(m) * o + j];
            total += (m < n ? 2.0 : 1.0) * inner * (k0 * k0 + c * (k1 * k1 + c * k2 * k2));
        }
    return float(std::sqrt(std::max(total, 0.0)));
}
