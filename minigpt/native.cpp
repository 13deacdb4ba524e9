// Reading a few characters: what Decoder.compute computes, as one parallel region in which the weights are read once.
//
// native.py compiles this file, lays the weights out and fills the structures; the names are those of decoder.py.
// Activations, keys and values are of type Real whatever the weights are kept in. Every sum has one order, whatever is
// read beside it, so that a text does not depend on its company.
//
// Vectors are GCC's, of 64 bytes; on a machine with shorter ones the compiler takes several.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int BLOCK = 64;  // outputs of a linear map whose weights lie side by side
constexpr int64_t ALONE = 1 << 20;  // multiplications below which one thread is done before others have come
constexpr int TILE = 4;    // rows that are multiplied by a weight while it is in a register

struct Linear {
    const void *weight;  // (blocks, in / PER, BLOCK, PER), filled up with zeros
    const void *units;   // what integer weights are in units of, (blocks * BLOCK,), or null
    const void *bias;    // (out,), or null
    int64_t in, out;
};

struct Norm {
    const void *scale, *shift;  // (C,), or null
};

struct Layer {
    Norm norm1, norm2;
    Linear qkv, out, up, down;
};

struct Model {
    const Layer *layers;
    const void *table;      // (taps * (V + 1), C)
    const void *positions;  // learned ones, (block_size, C), or null
    Norm norm;
    Linear head;
    int64_t n_layer, n_head, head_size, n_embd, hidden, taps, vocabulary, window, activation, embd_norm, qk_norm;
};

struct Call {
    const int64_t *ids;  // (B, width): what is read begins at first, with the characters just before it
    const void *cos, *sin;  // of the new characters' rotary angles, (T, S), or null
    void *kv;            // (n_layer, 2, B, H, slots, S)
    void *logits;        // (B, predicted, V)
    int64_t batch, count, width, slots, first, position, predicted;
};

template <class Real>
using Vector __attribute__((vector_size(64))) = Real;

template <class To, class From>
To reinterpret(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Each lane of a vector holds the weights of one output for PER inputs that follow each other; at() unpacks one of them.
template <class Real, class Weight>
struct Packed {  // float or double, as they are
    static constexpr int PER = 1;
    Vector<Real> lanes;
    Vector<Real> at(int) const { return lanes; }
};
template <>
struct Packed<float, uint16_t> {  // bfloat16: the upper half of a float
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

// ROWS rows of x, (rows, in), times a block of weights.
template <int ROWS, class Real, class Weight>
void multiply(const Weight *weight, const Real *x, int64_t in, Real sums[][BLOCK]) {
    using Lanes = Packed<Real, Weight>;
    constexpr int LANES = 64 / sizeof(Real), VECTORS = BLOCK / LANES, PER = Lanes::PER;
    Vector<Real> sum[ROWS][VECTORS] = {};
    const auto step = [&](int64_t i, int inputs) __attribute__((always_inline)) {
        Lanes packed[VECTORS];
        std::memcpy(packed, weight, sizeof(packed));
        weight += PER * BLOCK;
        for (int k = 0; k < inputs; k++)
            for (int v = 0; v < VECTORS; v++) {
                const Vector<Real> w = packed[v].at(k);
                for (int row = 0; row < ROWS; row++) sum[row][v] += w * x[row * in + i + k];
            }
    };
    const int64_t whole = in / PER * PER;
    for (int64_t i = 0; i < whole; i += PER) step(i, PER);
    if (whole < in) step(whole, in - whole);
    std::memcpy(sums, sum, sizeof(sum));
}

// then(row, output, value) for each value of the linear map of x, (rows, in); the threads share the blocks.
template <class Weight, class Real, class Then>
void apply(const Linear &map, const Real *x, int64_t rows, Then then) {
    const auto units = static_cast<const Real *>(map.units), bias = static_cast<const Real *>(map.bias);
    constexpr int PER = Packed<Real, Weight>::PER;
    const int64_t inputs = (map.in + PER - 1) / PER * PER;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (map.out + BLOCK - 1) / BLOCK; block++) {
        const auto weight = static_cast<const Weight *>(map.weight) + block * BLOCK * inputs;
        const int outputs = std::min<int64_t>(BLOCK, map.out - block * BLOCK);
        for (int64_t row = 0; row < rows; row += TILE) {
            Real sums[TILE][BLOCK];
            const int tile = std::min<int64_t>(TILE, rows - row);
            const Real *from = x + row * map.in;
            if (tile == 4) multiply<4>(weight, from, map.in, sums);
            if (tile == 3) multiply<3>(weight, from, map.in, sums);
            if (tile == 2) multiply<2>(weight, from, map.in, sums);
            if (tile == 1) multiply<1>(weight, from, map.in, sums);
            for (int n = 0; n < tile; n++)
                for (int o = 0; o < outputs; o++) {
                    const int64_t output = block * BLOCK + o;
                    Real value = sums[n][o];
                    if (units) value *= units[output];
                    if (bias) value += bias[output];
                    then(row + n, output, value);
                }
        }
    }
}

template <class Real>
void normalise(const Real *x, int64_t size, const Norm &norm, Real *y) {
    Real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i];
    const Real mean = sum / size;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    const Real factor = 1 / std::sqrt(squares / size + Real(1e-5));
    const auto scale = static_cast<const Real *>(norm.scale), shift = static_cast<const Real *>(norm.shift);
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor;
    if (scale)
        for (int64_t i = 0; i < size; i++) y[i] = y[i] * scale[i] + shift[i];
}

template <class Real>
Real activate(Real x, int64_t activation) {
    if (activation == 2) return x / 2 * (1 + std::erf(x * Real(0.70710678118654752440)));
    const Real rectified = std::max(x, Real(0));
    return activation == 1 ? rectified * rectified : rectified;
}

// Turn the channels of a head by the angles of its position.
template <class Real>
void rotate(Real *x, int64_t size, const Real *cos, const Real *sin) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        const Real left = x[i], right = x[i + half];
        x[i] = left * cos[i] + right * sin[i];
        x[i + half] = right * cos[i + half] + left * sin[i + half];
    }
}

// One query's attention to slots begin to end - 1; SIZE is size where the compiler shall know it, else 0.
template <int SIZE, class Real>
void attend(const Real *q, const Real *keys, const Real *values, int64_t begin, int64_t end, int64_t size, Real *weights,
            Real *y) {
    const int64_t S = SIZE ? SIZE : size;
    const Real scale = 1 / std::sqrt(Real(S));
    Real greatest = -INFINITY, total = 0;
    for (int64_t slot = begin; slot < end; slot++) {
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < S; i++) sum += q[i] * keys[slot * S + i];
        weights[slot] = sum * scale;
        greatest = std::max(greatest, weights[slot]);
    }
#pragma omp simd reduction(+ : total)
    for (int64_t slot = begin; slot < end; slot++) {
        weights[slot] = std::exp(weights[slot] - greatest);
        total += weights[slot];
    }
    Real sums[SIZE ? SIZE : 1] = {};
    Real *const to = SIZE ? sums : y;
    std::fill_n(to, S, Real(0));
    for (int64_t slot = begin; slot < end; slot++) {
        const Real weight = weights[slot];
#pragma omp simd
        for (int64_t i = 0; i < S; i++) to[i] += weight * values[slot * S + i];
    }
    for (int64_t i = 0; i < S; i++) y[i] = to[i] / total;
}

template <class Real, class Weight>
void read(const Model &model, const Call &call) {
    const int64_t B = call.batch, T = call.count, C = model.n_embd, H = model.n_head, S = model.head_size;
    const int64_t rows = B * T, slots = call.slots, predicted = call.predicted;
    const auto table = static_cast<const Real *>(model.table), positions = static_cast<const Real *>(model.positions);
    const auto cos = static_cast<const Real *>(call.cos), sin = static_cast<const Real *>(call.sin);
    const auto logits = static_cast<Real *>(call.logits);
    std::vector<Real> residual(rows * C), normal(rows * C), qkv(rows * 3 * H * S), mixed(rows * H * S),
        hidden(rows * model.hidden), scores(B * H * slots);
    Real *const x = residual.data(), *const z = normal.data();
    const bool worth_it = 12 * rows * model.n_layer * C * C >= ALONE;
#pragma omp parallel if (worth_it)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const int64_t *near = call.ids + row / T * call.width + call.first + row % T;
            Real *const to = x + row * C;
            for (int64_t tap = 0; tap < model.taps; tap++) {
                const Real *from = table + (near[tap] + tap * (model.vocabulary + 1)) * C;
                for (int64_t i = 0; i < C; i++) to[i] += from[i];
            }
            if (positions)
                for (int64_t i = 0; i < C; i++) to[i] += positions[(call.position + row % T) * C + i];
            if (model.embd_norm) normalise(to, C, Norm{}, to);
        }
        for (int64_t number = 0; number < model.n_layer; number++) {
            const Layer &layer = model.layers[number];
            Real *const keys = static_cast<Real *>(call.kv) + number * 2 * B * H * slots * S;
            Real *const values = keys + B * H * slots * S;
#pragma omp for
            for (int64_t row = 0; row < rows; row++) normalise(x + row * C, C, layer.norm1, z + row * C);
            apply<Weight>(layer.qkv, z, rows, [&](int64_t row, int64_t o, Real y) { qkv[row * 3 * H * S + o] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < B * H; head++) {
                const int64_t sequence = head / H, h = head % H;
                Real *const k = keys + head * slots * S, *const v = values + head * slots * S;
                for (int64_t t = 0; t < T; t++) {
                    const int64_t row = sequence * T + t, slot = call.first + t;
                    Real *const q = &qkv[row * 3 * H * S + h * S], *const new_k = k + slot * S;
                    std::copy_n(q + H * S, S, new_k);
                    std::copy_n(q + 2 * H * S, S, v + slot * S);
                    for (Real *one : {q, new_k}) {
                        if (model.qk_norm) normalise(one, S, Norm{}, one);
                        if (cos) rotate(one, S, cos + t * S, sin + t * S);
                    }
                    const int64_t begin = std::max<int64_t>(0, slot + 1 - model.window);
                    const auto attention = S == 64 ? attend<64, Real> : S == 32 ? attend<32, Real> : attend<0, Real>;
                    attention(q, k, v, begin, slot + 1, S, &scores[head * slots], &mixed[(row * H + h) * S]);
                }
            }
            const auto add = [&](int64_t row, int64_t o, Real y) { x[row * C + o] += y; };
            apply<Weight>(layer.out, mixed.data(), rows, add);
#pragma omp for
            for (int64_t row = 0; row < rows; row++) normalise(x + row * C, C, layer.norm2, z + row * C);
            apply<Weight>(layer.up, z, rows, [&](int64_t row, int64_t o, Real y) {
                hidden[row * model.hidden + o] = activate(y, model.activation);
            });
            apply<Weight>(layer.down, hidden.data(), rows, add);
        }
#pragma omp for
        for (int64_t n = 0; n < B * predicted; n++) {
            const int64_t row = n / predicted * T + T - predicted + n % predicted;
            normalise(x + row * C, C, model.norm, z + n * C);
        }
        apply<Weight>(model.head, z, B * predicted,
                      [&](int64_t n, int64_t o, Real y) { logits[n * model.vocabulary + o] = y; });
    }
}

}  // namespace

extern "C" {
void read_float32(const Model *model, const Call *call) { read<float, float>(*model, *call); }
void read_float64(const Model *model, const Call *call) { read<double, double>(*model, *call); }
void read_bfloat16(const Model *model, const Call *call) { read<float, uint16_t>(*model, *call); }
void read_int8(const Model *model, const Call *call) { read<float, int8_t>(*model, *call); }
}
