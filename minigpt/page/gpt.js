"use strict";
// The GPT of minigpt/model.py in plain JavaScript: it reads one character at a time and predicts the next one.
//
// Shapes in comments: C = n_embd, H heads of S = head_size channels, V characters in the vocabulary. A matrix is one
// Float32Array that holds its rows one after the other: a weight of (outputs, inputs) has `inputs` numbers per row.
// Sums are float64, as all arithmetic in JavaScript, and are rounded to float32 when they are stored.

// ------------------------------------------------------------------------------------------------ linear algebra

// Return weight · x + bias. Eight rows at a time: a processor adds several numbers in parallel only if no sum waits
// for the one before it, and each number of x is read once for eight products.
function linear(weight, bias, x) {
  const n = x.length, outputs = weight.length / n, y = new Float32Array(outputs);
  let row = 0;
  for (; row + 8 <= outputs; row += 8) {
    let a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (let i = 0, w = row * n; i < n; i++, w++) {
      const z = x[i];
      a += weight[w] * z;
      b += weight[w + n] * z;
      c += weight[w + 2 * n] * z;
      d += weight[w + 3 * n] * z;
      e += weight[w + 4 * n] * z;
      f += weight[w + 5 * n] * z;
      g += weight[w + 6 * n] * z;
      h += weight[w + 7 * n] * z;
    }
    y.set([a, b, c, d, e, f, g, h], row);
  }
  for (; row < outputs; row++) {
    let sum = 0;
    for (let i = 0, w = row * n; i < n; i++, w++) sum += weight[w] * x[i];
    y[row] = sum;
  }
  if (bias) addTo(y, bias);
  return y;
}

// Return LayerNorm(x): mean 0 and variance 1, then a trained scale and shift if the model has them.
function layerNorm(x, scale, shift) {
  const size = x.length, y = new Float32Array(size);
  let mean = 0, variance = 0;
  for (let i = 0; i < size; i++) mean += x[i] / size;
  for (let i = 0; i < size; i++) variance += (x[i] - mean) ** 2 / size;
  const factor = 1 / Math.sqrt(variance + 1e-5);
  for (let i = 0; i < size; i++) y[i] = (x[i] - mean) * factor;
  if (scale) for (let i = 0; i < size; i++) y[i] = y[i] * scale[i] + shift[i];
  return y;
}

// Add y to x, number by number.
function addTo(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

// Rotate each pair (i, i + S/2) of channels of x by the angle position * speeds[i] (Su et al. 2021).
function rotate(x, speeds, position) {
  const half = x.length / 2;
  for (let i = 0; i < half; i++) {
    const cos = Math.cos(position * speeds[i]), sin = Math.sin(position * speeds[i]), left = x[i], right = x[i + half];
    x[i] = left * cos - right * sin;
    x[i + half] = right * cos + left * sin;
  }
}

// Return the error function of x, with an error below 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

// Activations of the feed-forward layer, by their names in params.yaml. Each returns a new array.
const ACTIVATIONS = {
  relu: (x) => x.map((z) => Math.max(z, 0)),
  relu2: (x) => x.map((z) => Math.max(z, 0) ** 2),
  gelu: (x) => x.map((z) => 0.5 * z * (1 + erf(z / Math.SQRT2))),
  // The first half of x, z sigmoid(z), gates the second half.
  swiglu: (x) => {
    const half = x.length / 2;
    return x.subarray(0, half).map((z, i) => (z / (1 + Math.exp(-z))) * x[half + i]);
  },
};

// --------------------------------------------------------------------------------------------------- the KV cache

// Keys, values and convolved inputs of the characters that a model has read. With more characters than slots, those that
// no later one attends to are dropped.
class Cache {
  constructor(config) {
    this.window = Math.min(config.attention_window || config.block_size, config.block_size);
    this.kept = Math.max(this.window, config.mlp_conv) - 1; // characters that the next one reads
    this.slots = config.block_size + this.kept + 1;
    const layers = (width) => Array.from({ length: config.n_layer }, () => new Float32Array(this.slots * width));
    this.keys = layers(config.n_head * config.head_size);
    this.values = layers(config.n_head * config.head_size);
    this.inputs = layers(config.mlp_conv > 1 ? config.n_embd : 0); // of the feed-forward layers
    this.clear();
  }

  // Forget all characters.
  clear() {
    this.ids = []; // all characters read
    this.used = 0; // slots in use: the last ones of them
  }

  get length() {
    return this.ids.length;
  }

  // Forget the characters from number `length` on. Return whether the ones before it are still complete.
  truncate(length) {
    const dropped = this.length - this.used;
    if (length > this.length || (dropped && length - dropped < this.kept)) return false;
    this.ids.length = length;
    this.used = length - dropped;
    return true;
  }

  // Drop the oldest characters if all slots are used.
  makeRoom() {
    if (this.used < this.slots) return;
    for (const stored of [...this.keys, ...this.values, ...this.inputs]) {
      const width = stored.length / this.slots;
      stored.copyWithin(0, (this.used - this.kept) * width, this.used * width);
    }
    this.used = this.kept;
  }
}

// ------------------------------------------------------------------------------------------------------ the model

class GPT {
  // Create a model from its entry in the facts of a page and the bytes of its weights.
  static fromFacts(model, bytes) {
    if (bytes.length !== model.bytes || adler32(bytes) !== model.adler32) {
      throw new Error("the weights in this file are damaged or incomplete");
    }
    const tensors = {};
    for (const [name, tensor] of Object.entries(model.tensors)) tensors[name] = readTensor(tensor, bytes);
    return new GPT(model.config, tensors);
  }

  // `config` has the fields of the section `model` of params.yaml; `tensors` are Float32Arrays by their names in
  // model.safetensors.
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    if (!Object.hasOwn(ACTIVATIONS, config.activation)) {
      throw new Error(`the activation ${config.activation} is not implemented in this page`);
    }
    this.activate = ACTIVATIONS[config.activation];
    const needed = ["embedding.weight"];
    for (let n = 0; n < config.n_layer; n++) {
      for (const part of ["attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"]) {
        needed.push(`blocks.${n}.${part}.weight`);
      }
      if (config.mlp_conv > 1) needed.push(`blocks.${n}.conv`);
    }
    if (config.positions === "learned") needed.push("position.weight");
    if (config.embd_conv > 1) needed.push("conv");
    if (!config.tied_head) needed.push("head.weight");
    for (const name of needed) if (!tensors[name]) throw new Error(`the tensor ${name} is missing in this page`);
    const half = config.head_size / 2;
    this.speeds = Float64Array.from({ length: half }, (_, i) => config.rotary_base ** -(i / half));
    this.vocabSize = tensors["embedding.weight"].length / config.n_embd;
  }

  makeCache() {
    return new Cache(this.config);
  }

  // Read the character `id`, which follows those in the cache, and return the logits of the next one, (V,).
  //
  // `probe`, an object, receives intermediate results: `attention[layer][head]`, the weight of each
  // character in the cache, the oldest first and 0 outside the window; `lens[layer]`, the logits if the model ended
  // after this block (nostalgebraist 2020); `units[layer]`, the activations of the feed-forward layer.
  forward(id, cache, probe = null) {
    if (!Number.isInteger(id) || id < 0 || id >= this.vocabSize) throw new RangeError(`no character has the id ${id}`);
    cache.makeRoom();
    if (probe) Object.assign(probe, { attention: [], lens: [], units: [] });
    const x = this.embed(id, cache); // the residual stream, (C,): each block reads it and adds to it
    for (let n = 0; n < this.config.n_layer; n++) {
      addTo(x, this.attend(n, this.norm(`blocks.${n}.norm1`, x), cache, probe));
      addTo(x, this.feedForward(n, this.convolve(n, this.norm(`blocks.${n}.norm2`, x), cache), probe));
      if (probe) probe.lens.push(this.predict(x));
    }
    cache.ids.push(id);
    cache.used++;
    return this.predict(x);
  }

  // Return the start of the residual stream: the character, the characters before it, and its position.
  embed(id, cache) {
    const { n_embd: C, embd_conv: taps, positions, block_size, embd_norm } = this.config;
    const row = (name, index) => this.tensors[name].subarray(index * C, (index + 1) * C);
    const x = row("embedding.weight", id).slice();
    for (let back = 1; back < taps && back <= cache.length; back++) {
      const weight = row("conv", back - 1), before = row("embedding.weight", cache.ids[cache.length - back]);
      for (let i = 0; i < C; i++) x[i] += weight[i] * before[i];
    }
    if (positions === "learned") {
      if (cache.length >= block_size) throw new RangeError(`the context of ${block_size} characters is full`);
      addTo(x, row("position.weight", cache.length));
    }
    return embd_norm ? layerNorm(x) : x;
  }

  // Return the output of attention in block n for x, (C,): a weighted mean of the values of the visible characters.
  attend(n, x, cache, probe) {
    const { n_head: H, head_size: S, qk_norm, positions } = this.config;
    const width = H * S, keys = cache.keys[n], values = cache.values[n], slot = cache.used;
    const qkv = this.map(`blocks.${n}.attention.qkv`, x); // queries, keys and values of all heads
    for (let part = 0; part < 2 * H; part++) { // the queries and the keys
      const head = qkv.subarray(part * S, (part + 1) * S);
      if (qk_norm) head.set(layerNorm(head));
      if (positions === "rotary") rotate(head, this.speeds, cache.length);
    }
    keys.set(qkv.subarray(width, 2 * width), slot * width);
    values.set(qkv.subarray(2 * width), slot * width);

    // The causal mask: slots from the first to this one, and none after it.
    const first = Math.max(0, slot + 1 - cache.window), y = new Float32Array(width);
    if (probe) probe.attention.push([]);
    for (let h = 0; h < H; h++) {
      const weights = new Float32Array(slot + 1);
      let highest = -Infinity, total = 0;
      for (let t = first; t <= slot; t++) {
        let score = 0;
        for (let i = h * S, k = t * width + h * S; i < (h + 1) * S; i++, k++) score += qkv[i] * keys[k];
        weights[t] = score / Math.sqrt(S);
        highest = Math.max(highest, weights[t]);
      }
      for (let t = first; t <= slot; t++) total += weights[t] = Math.exp(weights[t] - highest);
      for (let t = first; t <= slot; t++) {
        const weight = (weights[t] /= total);
        for (let i = h * S, v = t * width + h * S; i < (h + 1) * S; i++, v++) y[i] += weight * values[v];
      }
      if (probe) probe.attention[n].push(weights);
    }
    return this.map(`blocks.${n}.attention.out`, y);
  }

  // Return the input of the feed-forward layer of block n: x, (C,), plus the weighted inputs of the characters before.
  convolve(n, x, cache) {
    const { n_embd: C, mlp_conv: taps } = this.config;
    if (taps === 1) return x;
    const inputs = cache.inputs[n], slot = cache.used, weights = this.tensors[`blocks.${n}.conv`], y = x.slice();
    inputs.set(x, slot * C);
    for (let back = 1; back < taps && back <= slot; back++) {
      const before = (slot - back) * C, weight = (back - 1) * C;
      for (let i = 0; i < C; i++) y[i] += weights[weight + i] * inputs[before + i];
    }
    return y;
  }

  // Return the output of the feed-forward layer of block n for x, (C,).
  feedForward(n, x, probe) {
    const units = this.activate(this.map(`blocks.${n}.feed_forward.up`, x));
    if (probe) probe.units.push(units);
    return this.map(`blocks.${n}.feed_forward.down`, units);
  }

  // Return the logits, (V,), for the residual stream x.
  predict(x) {
    const weight = this.tensors[this.config.tied_head ? "embedding.weight" : "head.weight"];
    return linear(weight, this.tensors["head.bias"], this.norm("norm", x));
  }

  map(name, x) {
    return linear(this.tensors[`${name}.weight`], this.tensors[`${name}.bias`], x);
  }

  norm(name, x) {
    return layerNorm(x, this.tensors[`${name}.weight`], this.tensors[`${name}.bias`]);
  }
}

// ---------------------------------------------------------------------------------- the weights as the page has them

// Return the bytes that a base64 text encodes. Line breaks are not allowed.
function decodeBase64(text) {
  const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const values = new Uint8Array(128);
  for (let i = 0; i < 64; i++) values[alphabet.charCodeAt(i)] = i;
  const value = (i) => values[text.charCodeAt(i) & 127];
  const bytes = new Uint8Array((text.length / 4) * 3);
  for (let i = 0, at = 0; i + 3 < text.length; i += 4, at += 3) {
    bytes[at] = (value(i) << 2) | (value(i + 1) >> 4);
    bytes[at + 1] = (value(i + 1) << 4) | (value(i + 2) >> 2);
    bytes[at + 2] = (value(i + 2) << 6) | value(i + 3);
  }
  return bytes.subarray(0, bytes.length - (text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0));
}

// Return the checksum Adler-32 (RFC 1950) of bytes.
function adler32(bytes) {
  let a = 1, b = 0;
  for (let i = 0; i < bytes.length; ) {
    const end = Math.min(i + 3800, bytes.length); // with more bytes, b could reach 2 ** 31: slower integers
    for (; i < end; i++) b += a += bytes[i];
    a %= 65521;
    b %= 65521;
  }
  return b * 65536 + a;
}

// Return a tensor as a Float32Array. Integers of int8 are multiplied by the scale of their row.
function readTensor({ shape, dtype, offset, scales_offset }, bytes) {
  const size = shape.reduce((a, b) => a * b, 1);
  const floats = (from, count) => new Float32Array(bytes.slice(from, from + 4 * count).buffer);
  if (dtype === "float32") return floats(offset, size);
  if (dtype === "bfloat16") { // the upper half of a float32
    const halves = new Uint16Array(bytes.slice(offset, offset + 2 * size).buffer), bits = new Uint32Array(size);
    for (let i = 0; i < size; i++) bits[i] = halves[i] << 16;
    return new Float32Array(bits.buffer);
  }
  if (dtype !== "int8") throw new Error(`the number format ${dtype} is not implemented in this page`);
  const integers = new Int8Array(bytes.buffer, bytes.byteOffset + offset, size), values = new Float32Array(size);
  const rows = shape[0], inputs = size / rows, scales = floats(scales_offset, rows);
  for (let row = 0, i = 0; row < rows; row++) {
    for (const end = i + inputs; i < end; i++) values[i] = integers[i] * scales[row];
  }
  return values;
}
