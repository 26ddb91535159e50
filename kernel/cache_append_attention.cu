// Norm, rotate, append to the rolling cache, attend: kv_cache.cache_append_attention on a GPU.
//
// Symbols (kv_cache.py, FlashAttention): B clips, Q queries, T new keys, H heads, D width per head;
// S scores, P softmax weights, m running maximum, l running sum, O output. A "thread block" is a
// group of CUDA threads; a "block" of kv_cache.py, one second of video, does not occur here.
//
// In PyTorch this is a chain of about a dozen small kernels. Each of them reads and writes whole
// tensors, or waits to be launched. Three rungs lead from there to here:
//
//   1. One pass over memory (`append`). RMSNorm needs a sum over a whole row (H*D). Then every
//      channel is scaled and rotated once. A thread block handles one row, a thread a few channel
//      pairs. Each value is read once, kept in registers during the sum, and written once, to its
//      final place: queries to a buffer for SDPA, keys and values into their slots. The cache is
//      never copied.
//   2. Online softmax (`fused`). Attention does not need all scores at once. Walk along the keys in
//      tiles and keep a running maximum m and sum l. When m grows, rescale the earlier results:
//          S = q k^T / sqrt(D)    m' = max(m, max S)    P = exp(S - m')
//          l = l exp(m - m') + sum P        O = O exp(m - m') + P v        result O / l
//   3. Keys split among warps (`fused`). A second of audio has 25 queries: too few to fill a GPU.
//      So a thread block takes 8 queries of one head, and its 8 warps take different tiles of keys.
//      Each warp has its own (m, l, O), and the same formula merges them at the end. Every key and
//      value is read by one warp of a thread block and serves 8 queries.
//
// PyTorch's SDPA follows `append`; it reads the slots in place. With 1152 video queries, attention
// is bound by matrix multiplication, and the kernels of SDPA use the tensor cores well. `fused` is
// for few queries, where the launches are the whole cost: it does everything in one launch.
//
// Thread blocks of one launch run in any order. So none of them may read a slot that this launch
// writes. Each thread block of `fused` recomputes the new keys from `k` and skips their slots.
//
// Measured on one NVIDIA H100 (torch 2.11.0+cu130, bfloat16, one clip), in microseconds. Floors are
// computed for 800 TFLOP/s and 3 TB/s (benchmarks/bench_attention.py):
//
//   `append` of a second of video, 1152 x 4096, moves 57 MB: 22, floor 19
//   attention of 1152 queries over 7296 keys (window 5 s), by SDPA: 272, floor 172
//                                              append + SDPA    fused
//   audio self-attention, 25 queries, eager              129       79
//       the same in a CUDA graph, window 5 s            11.3     19.9
//                                window 15 s            14.5     30.3
//   V2A, 25 queries, 1152 new keys, CUDA graph            77      735
//   A2V, 1152 queries, CUDA graph                         21      349
//
// So `fused` wins only where launches are the cost: few tokens, launched one by one. In a recorded
// pass it loses everywhere, because it multiplies on the ordinary cores, not on the tensor cores.
// V2A fits (170 of the 227 KB of shared memory that a thread block may have, in bfloat16), but each
// of its 128 thread blocks norms all the new keys again, whole rows of them.
//
// The interface is plain C, called through ctypes by kernel/cache_append_attention.py, which checks
// all arguments. Compiling without PyTorch's headers takes seconds, and any PyTorch can use the
// result. Sources: Dao et al., FlashAttention (2022) and Flash-Decoding (2023); Milakov and
// Gimelshein, Online normalizer calculation for softmax (2018); CUDA C++ Programming Guide.

#ifdef __CUDACC__  // else: tests compile this file with g++ and tests/emulation.h
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

struct StridedRows {  // (B, tokens, H*D); rows are contiguous, but may lie apart
    const void *x;
    long long clip, token;  // elements from one clip to the next, from one token to the next
};

struct Projection {  // queries or keys, before norm and rotation
    StridedRows rows;
    const void *weight;     // (H*D) of the norm
    const void *cos, *sin;  // (rope_rows, H*D/2)
    int tokens;
    int rope_rows;  // `tokens`, or 1: the same angles for all tokens, or 0: no rotation
};

struct Args {  // the same fields in the same order as Args in cache_append_attention.py
    Projection q, k;
    StridedRows v;            // values, T tokens like the keys
    void *k_cache, *v_cache;  // (B, slots, H*D)
    void *out;                // (B, Q, H*D): `append`: queries for SDPA; `fused`: attention
    int B, H, slots;
    int first, filled;  // slots [first, filled) are visible, including the new keys
    int start;          // the new keys belong in slots [start, start + T)
    int split;          // a pair is channels (i, i + D/2) of a head if 1, (2i, 2i + 1) if 0
    float eps;
};

template <typename scalar>
__device__ inline const scalar *row_of(const StridedRows &rows, int b, int token) {
    return (const scalar *)rows.x + b * rows.clip + token * rows.token;
}

constexpr int WARP = 32;
constexpr int WARPS = 8;    // per thread block of `fused`; the keys are split among them
constexpr int QUERIES = 8;  // per thread block of `fused`; they reuse each loaded key and value

// ---- numbers: stored as float, half or bfloat16, computed as float ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float &to, float x) { to = x; }
__device__ inline void store(__half &to, float x) { to = __float2half(x); }
__device__ inline void store(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }

template <typename scalar>
__device__ inline float rounded(float x) {
    scalar y;
    store(y, x);
    return to_float(y);
}

constexpr int at_most_16(int bytes) { return bytes < 16 ? bytes : 16; }

template <typename scalar, int n>
struct alignas(at_most_16(n * sizeof(scalar))) Vector {  // one load or store
    scalar at[n];
};

template <typename scalar, int n>
__device__ inline Vector<scalar, n> &vector_at(const scalar *p) {
    return *(Vector<scalar, n> *)p;
}

// ---- pairs of channels that are rotated together ----

// Pairs that a thread handles at once, V: both halves are then loads of up to 16 bytes.
template <typename scalar, int D>
__host__ __device__ constexpr int pairs_at_once() {
    int V = 16 / sizeof(scalar);
    while (D / 2 % V) V /= 2;
    return V;
}

template <int V>
struct Pairs {
    float a[V], b[V];
};

// Pairs [u V, (u + 1) V) of the D channels of one head.
template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline Pairs<V> load_pairs(const scalar *head, int u, bool split) {
    auto one = vector_at<scalar, V>(head + (split ? u * V : 2 * u * V));
    auto two = vector_at<scalar, V>(head + (split ? u * V + D / 2 : 2 * u * V + V));
    Pairs<V> x;
#pragma unroll
    for (int j = 0; j < V; ++j) {  // interleaved: channels 2j and 2j + 1 of `one`, then of `two`
        const int i = 2 * j % V;
        x.a[j] = to_float(split ? one.at[j] : 2 * j < V ? one.at[i] : two.at[i]);
        x.b[j] = to_float(split ? two.at[j] : 2 * j < V ? one.at[i + 1] : two.at[i + 1]);
    }
    return x;
}

template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline void store_pairs(scalar *head, int u, bool split, const Pairs<V> &x) {
    Vector<scalar, V> one, two;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int i = j / 2, k = (V + j) / 2;
        store(one.at[j], split ? x.a[j] : j % 2 ? x.b[i] : x.a[i]);
        store(two.at[j], split ? x.b[j] : j % 2 ? x.b[k] : x.a[k]);
    }
    vector_at<scalar, V>(head + (split ? u * V : 2 * u * V)) = one;
    vector_at<scalar, V>(head + (split ? u * V + D / 2 : 2 * u * V + V)) = two;
}

// x * inverse_rms * weight, rotated by the angles of the token (counted within its clip).
template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline Pairs<V> norm_and_rotate(Pairs<V> x, const Projection &p, int token, int H, int h,
                                           int u, float inverse_rms, bool split) {
    Pairs<V> w = load_pairs<scalar, D>((const scalar *)p.weight + h * D, u, split);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        x.a[j] *= inverse_rms * w.a[j];
        x.b[j] *= inverse_rms * w.b[j];
    }
    if (p.rope_rows == 0) return x;
    const int row = p.rope_rows == 1 ? 0 : token;
    const int at = (row * H + h) * (D / 2) + u * V;  // the tables are (rope_rows, H, D/2)
    auto cos = vector_at<scalar, V>((const scalar *)p.cos + at);
    auto sin = vector_at<scalar, V>((const scalar *)p.sin + at);
    Pairs<V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float c = to_float(cos.at[j]), s = to_float(sin.at[j]);
        y.a[j] = x.a[j] * c - x.b[j] * s;
        y.b[j] = x.b[j] * c + x.a[j] * s;
    }
    return y;
}

// ---- sums ----

__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// 1 / sqrt(mean x^2 + eps) of a row, computed by one warp.
template <typename scalar>
__device__ inline float inverse_rms(const scalar *row, int width, float eps) {
    constexpr int n = 16 / sizeof(scalar);
    float sum = 0;
    for (int i = threadIdx.x % WARP * n; i < width; i += WARP * n) {
        auto x = vector_at<scalar, n>(row + i);
#pragma unroll
        for (int j = 0; j < n; ++j) sum += to_float(x.at[j]) * to_float(x.at[j]);
    }
    return rsqrtf(warp_sum(sum) / width + eps);
}

// ---- rung 1: one pass over memory ----

// Grid (max(Q, T), B, 3): one thread block per row of q, k and v. A thread has V channel pairs.
template <typename scalar, int D>
__global__ void append(const __grid_constant__ Args a) {
    constexpr int V = pairs_at_once<scalar, D>(), UNITS = D / 2 / V;  // units of V pairs in a head
    extern __shared__ float4 shared[];
    float *partial = (float *)shared;  // (warps) sums of squares
    const int token = blockIdx.x, which = blockIdx.z;  // 0: q, 1: k, 2: v
    const int h = threadIdx.x / UNITS, u = threadIdx.x % UNITS;
    const bool split = a.split, has_pairs = h < a.H;  // false: spare threads of the last warp
    const Projection &p = which == 0 ? a.q : a.k;
    if (token >= p.tokens) return;  // Q and T may differ
    const size_t width = a.H * D, row = (size_t)blockIdx.y * p.tokens + token;
    const size_t slot = (size_t)blockIdx.y * a.slots + a.start + token;

    const scalar *from = row_of<scalar>(which == 2 ? a.v : p.rows, blockIdx.y, token) + h * D;
    scalar *to = which == 0   ? (scalar *)a.out + row * width
                 : which == 1 ? (scalar *)a.k_cache + slot * width
                              : (scalar *)a.v_cache + slot * width;
    Pairs<V> x = {};
    if (has_pairs) x = load_pairs<scalar, D>(from, u, split);
    if (which != 2) {  // values are copied unchanged
        float sum = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) sum += x.a[j] * x.a[j] + x.b[j] * x.b[j];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < blockDim.x / WARP; ++w) sum += partial[w];
        const float scale = rsqrtf(sum / width + a.eps);
        if (has_pairs) x = norm_and_rotate<scalar, D>(x, p, token, a.H, h, u, scale, split);
    }
    if (has_pairs) store_pairs<scalar, D>(to + h * D, u, split, x);
}

// ---- rungs 2 and 3: online softmax, keys split among warps ----

// One thread block of `fused`: its part of the work, its shared memory, its steps.
template <typename scalar, int D>
struct FusedBlock {
    static constexpr int V = pairs_at_once<scalar, D>(), UNITS = D / 2 / V;
    static constexpr int C = (D + WARP - 1) / WARP;  // a lane has channels [lane C, lane C + C)

    const Args &a;
    const int b = blockIdx.z, h = blockIdx.y, first_query = blockIdx.x * QUERIES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int Q = a.q.tokens, T = a.k.tokens, width = a.H * D;
    const int num_old = a.filled - a.first - T, num_keys = num_old + T;
    // In shared memory:
    float *const q;            // (QUERIES, D), stored as units of (2, V) pairs; scaled for exp2
    float *const P;            // (WARPS, WARP, QUERIES) softmax weights of each warp's tile
    float *const O;            // (WARPS, QUERIES, D): this line and the next, for the merge
    float *const m, *const l;  // (WARPS, QUERIES)
    scalar *const new_k;       // (T, D)

    __device__ FusedBlock(const Args &a, float4 *shared)
        : a(a), q((float *)shared), P(q + QUERIES * D), O(P + WARPS * WARP * QUERIES),
          m(O + WARPS * QUERIES * D), l(m + WARPS * QUERIES),
          new_k((scalar *)(l + WARPS * QUERIES)) {}

    static size_t shared_bytes(int T) {
        const size_t floats = QUERIES * D + WARPS * WARP * QUERIES + WARPS * QUERIES * (D + 2);
        return floats * sizeof(float) + (size_t)T * D * sizeof(scalar);
    }

    // This head of one row of x (B, tokens, H*D).
    __device__ scalar *head_of(const void *x, int tokens, int token) const {
        return (scalar *)x + ((size_t)b * tokens + token) * width + h * D;
    }
    __device__ const scalar *head_of(const StridedRows &rows, int token) const {
        return row_of<scalar>(rows, b, token) + h * D;
    }

    // Key j: first the old keys, without the slots of the new ones; then the new keys.
    __device__ int slot_of(int j) const {
        return a.first + j < a.start ? a.first + j : a.first + j + T;
    }
    __device__ const scalar *key(int j) const {
        return j < num_old ? head_of(a.k_cache, a.slots, slot_of(j)) : new_k + (j - num_old) * D;
    }
    __device__ const scalar *value(int j) const {
        return j < num_old ? head_of(a.v_cache, a.slots, slot_of(j)) : head_of(a.v, j - num_old);
    }

    // One warp: norm (over all heads) and rotate this head of a token; pass the result to `use`.
    template <typename Use>
    __device__ void prepare(const Projection &p, int token, Use use) const {
        const scalar *head = head_of(p.rows, token);
        const float scale = inverse_rms(head - h * D, width, a.eps);
        for (int u = lane; u < UNITS; u += WARP) {
            Pairs<V> x = load_pairs<scalar, D>(head, u, a.split);
            use(u, norm_and_rotate<scalar, D>(x, p, token, a.H, h, u, scale, a.split));
        }
    }

    __device__ void prepare_queries() const {
        const float scale = 1.44269504f / sqrtf(D);  // log2(e) / sqrt(D), for exp2
        for (int r = warp; r < QUERIES; r += WARPS) {
            float *row = q + r * D;
            if (first_query + r >= Q) {  // zeros take part; their result is not written
                for (int i = lane; i < D; i += WARP) row[i] = 0;
                continue;
            }
            prepare(a.q, first_query + r, [&](int u, const Pairs<V> &x) {
                for (int j = 0; j < V; ++j) {  // rounded as PyTorch would store them
                    row[u * 2 * V + j] = rounded<scalar>(x.a[j]) * scale;
                    row[u * 2 * V + V + j] = rounded<scalar>(x.b[j]) * scale;
                }
            });
        }
    }

    // Every thread block computes them itself: it cannot wait for another one.
    __device__ void prepare_new_keys() const {
        for (int t = warp; t < T; t += WARPS)
            prepare(a.k, t, [&](int u, const Pairs<V> &x) {
                store_pairs<scalar, D>(new_k + t * D, u, a.split, x);
            });
    }

    // The work is divided among the thread blocks of a head. This launch never reads these slots.
    __device__ void append_new() const {
        constexpr int n = 16 / sizeof(scalar);
        const int threads = WARPS * WARP;
        for (int i = blockIdx.x * threads + threadIdx.x; i < T * D / n; i += gridDim.x * threads) {
            const int t = i * n / D, c = i * n % D;
            scalar *k = head_of(a.k_cache, a.slots, a.start + t) + c;
            scalar *v = head_of(a.v_cache, a.slots, a.start + t) + c;
            vector_at<scalar, n>(k) = vector_at<scalar, n>(new_k + i * n);
            vector_at<scalar, n>(v) = vector_at<scalar, n>(head_of(a.v, t) + c);
        }
    }

    // S = q k^T for one key; every lane has its own key.
    __device__ void scores(const scalar *k, float (&S)[QUERIES]) const {
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            const Pairs<V> x = load_pairs<scalar, D>(k, u, a.split);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r) {
                auto qa = vector_at<float, V>(q + r * D + u * 2 * V);
                auto qb = vector_at<float, V>(q + r * D + u * 2 * V + V);
#pragma unroll
                for (int j = 0; j < V; ++j) S[r] += qa.at[j] * x.a[j] + qb.at[j] * x.b[j];
            }
        }
    }

    // A warp's result so far: m for the warp, l as one sum per lane, O as C channels per lane.
    struct Running {
        float m[QUERIES], l[QUERIES], O[QUERIES][C];
    };

    // New maximum; rescale; P for the key of this lane.
    __device__ Vector<float, QUERIES> softmax(const float (&S)[QUERIES], Running &run) const {
        Vector<float, QUERIES> p;
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) {
            const float m_new = fmaxf(run.m[r], warp_max(S[r])), shrink = exp2f(run.m[r] - m_new);
            p.at[r] = exp2f(S[r] - m_new);
            run.l[r] = run.l[r] * shrink + p.at[r];
            run.m[r] = m_new;
#pragma unroll
            for (int c = 0; c < C; ++c) run.O[r][c] *= shrink;
        }
        return p;
    }

    // O += P v over all keys of a tile; every lane has its own channels.
    __device__ void add_values(int tile, Running &run) const {
        if (lane * C >= D) return;  // D < 32: this lane has no channels
        const int count = num_keys - tile < WARP ? num_keys - tile : WARP;
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            auto v = vector_at<scalar, C>(value(tile + j) + lane * C);
            auto p = vector_at<float, QUERIES>(P + (warp * WARP + j) * QUERIES);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r)
#pragma unroll
                for (int c = 0; c < C; ++c) run.O[r][c] += p.at[r] * to_float(v.at[c]);
        }
    }

    __device__ void attend(Running &run) const {
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) run.m[r] = -INFINITY;
        for (int tile = warp * WARP; tile < num_keys; tile += WARPS * WARP) {
            const bool valid = tile + lane < num_keys;
            float S[QUERIES] = {};
            scores(key(valid ? tile + lane : tile), S);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r) S[r] = valid ? S[r] : -INFINITY;
            vector_at<float, QUERIES>(P + (warp * WARP + lane) * QUERIES) = softmax(S, run);
            __syncwarp();  // before: a lane per key; after: a lane per C channels
            add_values(tile, run);
            __syncwarp();  // the next tile overwrites P
        }
    }

    __device__ void store_partial(const Running &run) const {
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) {
            const float sum = warp_sum(run.l[r]);
            const int row = warp * QUERIES + r;
            if (lane == 0) m[row] = run.m[r], l[row] = sum;
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (lane * C < D) O[row * D + lane * C + c] = run.O[r][c];
        }
    }

    // A warp without any tile has m = -inf, so its weight is 0.
    __device__ void merge() const {
        for (int i = threadIdx.x; i < QUERIES * D; i += WARPS * WARP) {
            const int r = i / D, c = i % D;
            if (first_query + r >= Q) return;
            float top = -INFINITY, sum = 0, out = 0;
            for (int w = 0; w < WARPS; ++w) top = fmaxf(top, m[w * QUERIES + r]);
            for (int w = 0; w < WARPS; ++w) {
                const float weight = exp2f(m[w * QUERIES + r] - top);
                sum += weight * l[w * QUERIES + r];
                out += weight * O[(w * QUERIES + r) * D + c];
            }
            store(head_of(a.out, Q, first_query + r)[c], out / sum);
        }
    }
};

// Grid (ceil(Q / QUERIES), H, B): one thread block per 8 queries of one head.
template <typename scalar, int D>
__global__ void __launch_bounds__(WARPS *WARP, 1) fused(const __grid_constant__ Args a) {
    extern __shared__ float4 shared[];
    const FusedBlock<scalar, D> block(a, shared);
    block.prepare_queries();
    block.prepare_new_keys();
    __syncthreads();
    block.append_new();
    typename FusedBlock<scalar, D>::Running run = {};
    block.attend(run);
    block.store_partial(run);
    __syncthreads();
    block.merge();
}

// ---- launch ----

template <typename scalar, int D>
cudaError_t launch(bool is_fused, const Args &a, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.stream = stream;
    if (!is_fused) {
        const int threads = a.H * (D / 2 / pairs_at_once<scalar, D>());
        const int tokens = a.q.tokens > a.k.tokens ? a.q.tokens : a.k.tokens;
        config.blockDim = dim3((threads + WARP - 1) / WARP * WARP);
        config.gridDim = dim3(tokens, a.B, 3);
        config.dynamicSmemBytes = WARP * sizeof(float);  // at most 32 warps
        return cudaLaunchKernelEx(&config, append<scalar, D>, a);
    }
    config.blockDim = dim3(WARPS * WARP);
    config.gridDim = dim3((a.q.tokens + QUERIES - 1) / QUERIES, a.H, a.B);
    config.dynamicSmemBytes = FusedBlock<scalar, D>::shared_bytes(a.k.tokens);
    // A kernel must ask for more than 48 KB; more than the GPU has is refused here.
    cudaError_t error = cudaFuncSetAttribute(
        fused<scalar, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
    return error ? error : cudaLaunchKernelEx(&config, fused<scalar, D>, a);
}

#ifndef HEAD_SIZES  // D of audio and video: toy (24, 40), full size (64, 128)
#define HEAD_SIZES(X) X(24) X(40) X(64) X(128)
#endif

template <typename scalar>
cudaError_t launch_for(int D, bool is_fused, const Args &a, cudaStream_t stream) {
#define CASE(size) \
    if (D == size) return launch<scalar, size>(is_fused, a, stream);
    HEAD_SIZES(CASE)
#undef CASE
    return cudaErrorInvalidValue;
}

// dtype: 0 float, 1 half, 2 bfloat16. is_fused: `fused` instead of `append`. Returns a CUDA error.
extern "C" int cache_append_attention(int dtype, int D, int is_fused, const Args *a, void *stream) {
    auto on = (cudaStream_t)stream;
    if (dtype == 0) return launch_for<float>(D, is_fused, *a, on);
    if (dtype == 1) return launch_for<__half>(D, is_fused, *a, on);
    if (dtype == 2) return launch_for<__nv_bfloat16>(D, is_fused, *a, on);
    return cudaErrorInvalidValue;
}

// Call this first: it fails, for instance, if the driver is older than the compiler.
extern "C" int cache_append_ready() { return cudaFree(nullptr); }

extern "C" int cache_append_args_size() { return sizeof(Args); }

extern "C" const char *cache_append_error(int code) {
    return cudaGetErrorString((cudaError_t)code);
}
