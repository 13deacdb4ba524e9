// The forward pass of a few characters with a KV cache, as one parallel region in which the weights are read once.
//
// compiler.py compiles this file; native.py lays the weights out and fills the structures. Tests compare the result with
// GPT.forward in model.py. Sums are of type Real. If weights are quantized, keys and values are bfloat16. Some
// processors multiply pairs of bfloat16 numbers in one instruction; there the inputs of products are bfloat16 too. Every
// sum has one order, whatever else is in the batch, so a text does not depend on the texts written with it.
//
// Vectors are GCC's vector extensions of 64 bytes; for shorter registers the compiler uses several.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

namespace {

constexpr int BLOCK = 64;  // outputs of a linear map whose weights are next to each other
constexpr int64_t PARALLEL_FROM = 1 << 20;  // multiplications; with fewer, one thread is faster than waking the others
constexpr int TILE = 6;  // rows that are multiplied by a weight while it is in a register

struct Linear {
    const void *weight;  // (blocks, in / PER, BLOCK, PER), padded with zeros
    const void *scales;  // of int8 weights, (blocks * BLOCK,), or null
    const void *bias;    // (out,), or null
    int64_t in, out;
};

struct Norm {
    const void *scale, *shift;  // (C,), or null
};

struct Layer {
    Norm norm1, norm2;
    Linear qkv, out, up, down;
    const void *conv;  // (recent, C), the weights of the oldest input first, or null
};

struct Model {
    const Layer *layers;
    const void *table;      // (taps * (V + 1), C)
    const void *positions;  // learned ones, (block_size, C), or null
    Norm norm;
    Linear head;
    int64_t n_layer, n_head, head_size, n_embd, hidden, taps, recent, vocabulary, window, activation, embd_norm,
        qk_norm;
};

struct Call {
    const int64_t *ids;     // (B, width): the new characters start at first, after those that the convolution reads
    const void *cos, *sin;  // of the rotary angles of the new characters, (T, S / 2), or null
    void *kv;               // (n_layer, 2, B, H, slots, S)
    void *recent;           // last inputs of the feed-forward layers, (n_layer, B, recent, C), the oldest first
    void *logits;           // (B, num_logits, V)
    int64_t batch, count, width, slots, first, position, num_logits;
};

template <class Real>
using Vector __attribute__((vector_size(64))) = Real;

template <class To, class From>
To load(const From *from) {
    To to;
    std::memcpy(&to, from, sizeof(to));
    return to;
}
template <class To, class From>
To reinterpret(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&from);
}

struct Bfloat16 {  // the upper half of a float
    uint16_t half;
    Bfloat16() = default;
    Bfloat16(float x) {
        const auto bits = reinterpret<uint32_t>(x);
        half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    operator float() const { return reinterpret<float>(uint32_t(half) << 16); }
};

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are unpacked from their low bits");

// Each lane of a vector holds PER consecutive numbers; at() unpacks one of each lane.
template <class Real, class Weight>
struct Packed {  // float or double, as they are
    static constexpr int PER = 1;
    Vector<Real> lanes;
    Vector<Real> at(int) const { return lanes; }
};
template <>
struct Packed<float, Bfloat16> {
    static constexpr int PER = 2;
    Vector<uint32_t> lanes;
    Vector<float> at(int k) const { return reinterpret<Vector<float>>(k ? lanes & 0xffff0000u : lanes << 16); }
};
template <>
struct Packed<float, int8_t> {
    static constexpr int PER = 4;
    Vector<int32_t> lanes;
    Vector<float> at(int k) const { return __builtin_convertvector((lanes << (24 - 8 * k)) >> 24, Vector<float>); }
};

// sum + weights * their inputs.
template <class Sum, class Lanes, class Input>
Sum add(Sum sum, const Lanes &weights, const Input *x) {
    for (int k = 0; k < Lanes::PER; k++) sum += weights.at(k) * x[k];
    return sum;
}
#ifdef __AVX512BF16__
inline Vector<float> add(Vector<float> sum, const Packed<float, Bfloat16> &weights, const Bfloat16 *x) {
    const auto pair = reinterpret<__m512bh>(_mm512_set1_epi32(load<int32_t>(x)));
    return _mm512_dpbf16_ps(sum, reinterpret<__m512bh>(weights.lanes), pair);
}
const struct Bytes {  // bytes of the bfloat16 numbers 0 to 127, and their order: lower, upper, lower, upper
    Vector<uint8_t> lower[2], upper[2], first, second;
    Bytes() {
        for (int n = 0; n < 128; n++) {
            lower[n / 64][n % 64] = Bfloat16(n).half;
            upper[n / 64][n % 64] = Bfloat16(n).half >> 8;
        }
        for (int n = 0; n < 64; n++) {
            first[n] = n / 4 * 4 + n % 4 / 2 + n % 2 * 64;
            second[n] = first[n] + 2;
        }
    }
} bytes;
inline Vector<float> add(Vector<float> sum, const Packed<float, int8_t> &weights, const Bfloat16 *x) {
    const auto signs = reinterpret<Vector<int8_t>>(weights.lanes);
    const auto number = reinterpret<Vector<uint8_t>>(signs < 0 ? -signs : signs);
    const auto lower = __builtin_shuffle(bytes.lower[0], bytes.lower[1], number);
    const auto upper = __builtin_shuffle(bytes.upper[0], bytes.upper[1], number) |
                       (reinterpret<Vector<uint8_t>>(signs) & uint8_t(0x80));
    const auto pairs = [&](const Vector<uint8_t> &places) {
        return Packed<float, Bfloat16>{reinterpret<Vector<uint32_t>>(__builtin_shuffle(lower, upper, places))};
    };
    return add(add(sum, pairs(bytes.first), x), pairs(bytes.second), x + 2);
}
#endif

int64_t padded(int64_t in) { return (in + 3) / 4 * 4; }  // inputs of a row, padding included

// Multiply ROWS rows of x, (rows, padded(in)), by a block of weights.
template <int ROWS, class Real, class Weight, class Input>
void multiply(const Weight *weight, const Input *x, int64_t in, int rows, Real sums[][BLOCK]) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return multiply<ROWS - 1>(weight, x, in, rows, sums);
    using Lanes = Packed<Real, Weight>;
    constexpr int LANES = 64 / sizeof(Real), VECTORS = BLOCK / LANES;
    const int64_t stride = padded(in);
    Vector<Real> sum[ROWS][VECTORS] = {};
    for (int64_t i = 0; i < in; i += Lanes::PER)
        for (int v = 0; v < VECTORS; v++, weight += Lanes::PER * LANES) {
            const auto packed = load<Lanes>(weight);
            for (int row = 0; row < ROWS; row++) sum[row][v] = add(sum[row][v], packed, x + row * stride + i);
        }
    for (int row = 0; row < ROWS; row++)  // row by row, or the compiler keeps the sums in memory
        for (int v = 0; v < VECTORS; v++) std::memcpy(&sums[row][v * LANES], &sum[row][v], 64);
}

// Call then(row, output, value) for each value of the linear map of x, (rows, padded(in)); threads share the blocks.
template <class Real, class Weight, class Input, class Then>
void apply(const Linear &map, const Input *x, int64_t rows, Then then) {
    const auto scales = static_cast<const Real *>(map.scales), bias = static_cast<const Real *>(map.bias);
    constexpr int PER = Packed<Real, Weight>::PER;
    const int64_t inputs = (map.in + PER - 1) / PER * PER;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (map.out + BLOCK - 1) / BLOCK; block++) {
        const auto weight = static_cast<const Weight *>(map.weight) + block * BLOCK * inputs;
        const int outputs = std::min<int64_t>(BLOCK, map.out - block * BLOCK);
        for (int64_t row = 0; row < rows; row += TILE) {
            Real sums[TILE][BLOCK];
            const int tile = std::min<int64_t>(TILE, rows - row);
            multiply<TILE>(weight, x + row * padded(map.in), map.in, tile, sums);
            for (int n = 0; n < tile; n++)
                for (int o = 0; o < outputs; o++) {
                    const int64_t output = block * BLOCK + o;
                    Real value = sums[n][o];
                    if (scales) value *= scales[output];
                    if (bias) value += bias[output];
                    then(row + n, output, value);
                }
        }
    }
}

template <class Real, class Output>
void normalize(const Real *x, int64_t size, const Norm &norm, Output *y) {
    Real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i];
    const Real mean = sum / size;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    const Real factor = 1 / std::sqrt(squares / size + Real(1e-5));
    const auto scale = static_cast<const Real *>(norm.scale), shift = static_cast<const Real *>(norm.shift);
    for (int64_t i = 0; i < size; i++) {
        const Real normal = (x[i] - mean) * factor;
        y[i] = scale ? normal * scale[i] + shift[i] : normal;
    }
}

// Write y plus the weighted recent inputs to z. Then y replaces the oldest input, and comes last.
template <class Real, class Output>
void convolve(const Real *y, const Real *weights, Real *recent, int64_t count, int64_t size, Output *z) {
    for (int64_t i = 0; i < size; i++) {
        Real sum = y[i];
        for (int64_t n = 0; n < count; n++) sum += weights[n * size + i] * recent[n * size + i];
        z[i] = sum;
    }
    std::copy(recent + size, recent + count * size, recent);
    std::copy_n(y, size, recent + (count - 1) * size);
}

constexpr int64_t RELU2 = 1, GELU = 2, SWIGLU = 3;  // in the order of native.py

template <class Real>
Real activate(Real x, int64_t activation) {
    if (activation == GELU) return x / 2 * (1 + std::erf(x * Real(0.70710678118654752440)));
    const Real rectified = std::max(x, Real(0));
    return activation == RELU2 ? rectified * rectified : rectified;
}

// Rotate the channel pairs (i, i + size / 2) of a head by the angles of its position.
template <class Real>
void rotate(Real *x, int64_t size, const Real *cos, const Real *sin) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        const Real left = x[i], right = x[i + half];
        x[i] = left * cos[i] - right * sin[i];
        x[i + half] = right * cos[i] + left * sin[i];
    }
}

// e^x for x <= 0. In float, 2^n e^r with |r| <= ln(2) / 2 and a Taylor series, whose error is 2^-23 then.
double power(double x) { return std::exp(x); }
float power(float x) {
    x = std::max(x, -87.0f);
    const float n = x * 1.44269504f + 0x1.8p23f - 0x1.8p23f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    const float series =
        1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return series * reinterpret<float>((int32_t(n) + 127) << 23);
}

// Return a vector whose lane n is the sum of the lanes of vector n. Each round adds pairs of vectors into one.
template <class Real>
Vector<Real> sums_of_lanes(Vector<Real> *vectors) {
    constexpr int LANES = 64 / sizeof(Real);
    using Index = Vector<std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>>;
    Index lane;
    for (int n = 0; n < LANES; n++) lane[n] = n;
#pragma GCC unroll 4
    for (int apart = LANES / 2; apart; apart /= 2)
#pragma GCC unroll 8
        for (int n = 0; n < apart; n++) {
            const Vector<Real> a = vectors[n], b = vectors[n + apart];
            const Index own = lane + (lane & apart) * (LANES / apart), other = own ^ apart;
            vectors[n] = __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
        }
    return vectors[0];
}

// Attend from one query to slots begin to end - 1. SIZE is size where it is known at compile time, else 0. room has
// space for the channels, the slots and a vector.
template <int SIZE, class Real, class Stored, class Input>
void attend(const Real *query, const Stored *keys, const Stored *values, int64_t begin, int64_t end, int64_t size,
            Real *room, Input *y) {
    using Lanes = Packed<Real, Stored>;
    constexpr int LANES = 64 / sizeof(Real), PER = Lanes::PER, WIDTH = PER * LANES;
    const int64_t S = SIZE ? SIZE : size, whole = S / WIDTH * WIDTH;
    const Real scale = 1 / std::sqrt(Real(S));
    Real *const q = room, *const weights = room + S, greatest = -INFINITY, total = 0;
    for (int64_t i = 0; i < S; i++)  // in the order in which at() unpacks keys
        q[i < whole ? i / WIDTH * WIDTH + i % PER * LANES + i % WIDTH / PER : i] = query[i] * scale;
    for (int64_t first = begin; first < end; first += LANES) {
        Vector<Real> sums[LANES] = {};
#pragma GCC unroll 16
        for (int n = 0; n < LANES; n++) {
            const Stored *const k = keys + std::min(first + n, end - 1) * S;
            for (int64_t i = 0; i < whole; i += WIDTH)
                for (int part = 0; part < PER; part++)
                    sums[n] += load<Vector<Real>>(q + i + part * LANES) * load<Lanes>(k + i).at(part);
            for (int64_t i = whole; i < S; i++) sums[n][i % LANES] += q[i] * k[i];
        }
        const Vector<Real> scores = sums_of_lanes<Real>(sums);
        std::memcpy(weights + first, &scores, sizeof(scores));
    }
#pragma omp simd reduction(max : greatest)
    for (int64_t slot = begin; slot < end; slot++) greatest = std::max(greatest, weights[slot]);
#pragma omp simd reduction(+ : total)
    for (int64_t slot = begin; slot < end; slot++) {
        weights[slot] = power(weights[slot] - greatest);
        total += weights[slot];
    }
    constexpr int PER_PASS = SIZE ? SIZE / WIDTH : 1;
    for (int64_t i = 0; i < whole; i += PER_PASS * WIDTH) {
        Vector<Real> sums[PER_PASS][PER] = {};
        for (int64_t slot = begin; slot < end; slot++)
            for (int n = 0; n < PER_PASS; n++)
                for (int part = 0; part < PER; part++)
                    sums[n][part] += weights[slot] * load<Lanes>(values + slot * S + i + n * WIDTH).at(part);
        for (int n = 0; n < PER_PASS * WIDTH; n++) y[i + n] = sums[n / WIDTH][n % PER][n % WIDTH / PER] / total;
    }
    for (int64_t i = whole; i < S; i++) {
        Real sum = 0;
        for (int64_t slot = begin; slot < end; slot++) sum += weights[slot] * values[slot * S + i];
        y[i] = sum / total;
    }
}

template <class Real, class Weight>
void forward(const Model &model, const Call &call) {
    using Stored = std::conditional_t<std::is_same_v<Real, Weight>, Real, Bfloat16>;
    using Input = std::conditional_t<PAIRS, Stored, Real>;
    const int64_t B = call.batch, T = call.count, C = model.n_embd, H = model.n_head, S = model.head_size;
    const int64_t rows = B * T, slots = call.slots, num_logits = call.num_logits;
    const auto table = static_cast<const Real *>(model.table), positions = static_cast<const Real *>(model.positions);
    const auto cos = static_cast<const Real *>(call.cos), sin = static_cast<const Real *>(call.sin);
    const auto logits = static_cast<Real *>(call.logits);
    const int64_t attended = padded(H * S), wide = padded(model.hidden), narrow = padded(C);  // row lengths of inputs
    const int64_t room = slots + S + 64 / sizeof(Real);  // for the scores of a query
    std::vector<Real> residual(rows * C), qkv(rows * 3 * H * S), scores(B * H * room);
    const int64_t gates = model.activation == SWIGLU ? model.hidden : 0;
    std::vector<Real> gated(rows * 2 * gates), single(B * C);
    std::vector<Input> normal(rows * narrow), mixed(rows * attended), hidden(rows * wide);
    Real *const x = residual.data();
    Input *const z = normal.data();
    const bool parallel = 12 * rows * model.n_layer * C * C >= PARALLEL_FROM;
#pragma omp parallel if (parallel)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const int64_t *newest = call.ids + row / T * call.width + call.first + row % T;
            Real *const to = x + row * C;
            for (int64_t tap = 0; tap < model.taps; tap++) {
                const Real *from = table + (newest[tap] + tap * (model.vocabulary + 1)) * C;
                for (int64_t i = 0; i < C; i++) to[i] += from[i];
            }
            if (positions)
                for (int64_t i = 0; i < C; i++) to[i] += positions[(call.position + row % T) * C + i];
            if (model.embd_norm) normalize(to, C, Norm{}, to);
        }
        for (int64_t number = 0; number < model.n_layer; number++) {
            const Layer &layer = model.layers[number];
            Stored *const keys = static_cast<Stored *>(call.kv) + number * 2 * B * H * slots * S;
            Stored *const values = keys + B * H * slots * S;
#pragma omp for
            for (int64_t row = 0; row < rows; row++) normalize(x + row * C, C, layer.norm1, z + row * narrow);
            apply<Real, Weight>(layer.qkv, z, rows,
                                [&](int64_t row, int64_t o, Real y) { qkv[row * 3 * H * S + o] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < B * H; head++) {
                const int64_t sequence = head / H, h = head % H;
                Stored *const k = keys + head * slots * S, *const v = values + head * slots * S;
                for (int64_t t = 0; t < T; t++) {
                    const int64_t row = sequence * T + t, slot = call.first + t;
                    Real *const q = &qkv[row * 3 * H * S + h * S], *const new_k = q + H * S;
                    for (Real *one : {q, new_k}) {
                        if (model.qk_norm) normalize(one, S, Norm{}, one);
                        if (cos) rotate(one, S, cos + t * (S / 2), sin + t * (S / 2));
                    }
                    std::copy_n(new_k, S, k + slot * S);
                    std::copy_n(new_k + H * S, S, v + slot * S);
                    // The causal mask: slots from begin to this one, and none after it.
                    const int64_t begin = std::max<int64_t>(0, slot + 1 - model.window);
                    const auto attention = S == 64   ? attend<64, Real, Stored, Input>
                                           : S == 32 ? attend<32, Real, Stored, Input>
                                                     : attend<0, Real, Stored, Input>;
                    attention(q, k, v, begin, slot + 1, S, &scores[head * room], &mixed[row * attended + h * S]);
                }
            }
            const auto add = [&](int64_t row, int64_t o, Real y) { x[row * C + o] += y; };
            apply<Real, Weight>(layer.out, mixed.data(), rows, add);
#pragma omp for
            for (int64_t sequence = 0; sequence < B; sequence++)
                for (int64_t row = sequence * T; row < (sequence + 1) * T; row++) {
                    if (!layer.conv) {
                        normalize(x + row * C, C, layer.norm2, z + row * narrow);
                        continue;
                    }
                    Real *const y = &single[sequence * C];
                    normalize(x + row * C, C, layer.norm2, y);
                    Real *const recent = static_cast<Real *>(call.recent) + (number * B + sequence) * model.recent * C;
                    convolve(y, static_cast<const Real *>(layer.conv), recent, model.recent, C, z + row * narrow);
                }
            apply<Real, Weight>(layer.up, z, rows, [&](int64_t row, int64_t o, Real y) {
                if (gates) gated[row * 2 * gates + o] = y;
                else hidden[row * wide + o] = activate(y, model.activation);
            });
            if (gates) {
#pragma omp for
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < gates; i++) {
                        const Real *const gate = &gated[row * 2 * gates + i];
                        const Real small = power(-std::abs(*gate));
                        hidden[row * wide + i] = *gate * gate[gates] * (*gate < 0 ? small : 1) / (1 + small);
                    }
            }
            apply<Real, Weight>(layer.down, hidden.data(), rows, add);
        }
#pragma omp for
        for (int64_t n = 0; n < B * num_logits; n++) {
            const int64_t row = n / num_logits * T + T - num_logits + n % num_logits;
            normalize(x + row * C, C, model.norm, z + n * narrow);
        }
        apply<Real, Weight>(model.head, z, B * num_logits,
                      [&](int64_t n, int64_t o, Real y) { logits[n * model.vocabulary + o] = y; });
    }
}

}  // namespace

extern "C" {
void forward_float32(const Model *model, const Call *call) { forward<float, float>(*model, *call); }
void forward_float64(const Model *model, const Call *call) { forward<double, double>(*model, *call); }
void forward_bfloat16(const Model *model, const Call *call) { forward<float, Bfloat16>(*model, *call); }
void forward_int8(const Model *model, const Call *call) { forward<float, int8_t>(*model, *call); }
}
