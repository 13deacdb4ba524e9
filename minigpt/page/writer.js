"use strict";
// The choice of the next character, and the loop that writes: minigpt/generation/sampling.py and generator.py in plain
// JavaScript. Probabilities are float64, and the same operations come in the same order, so that both write one text.

// Return the distribution that characters are drawn from, float64 (V,), up to a factor. Temperature (not 0), top_k,
// top_p and min_p are applied in this order, as in minigpt/generation/sampling.py.
function filterProbabilities(logits, sampling) {
  const scaled = sampling.temperature === 1 ? logits : logits.map((z) => z / Math.fround(sampling.temperature));
  let least = -Infinity;
  if (sampling.top_k > 0 && sampling.top_k < scaled.length) least = scaled.slice().sort().at(-sampling.top_k);
  const highest = scaled.reduce((a, b) => Math.max(a, b));
  const probabilities = Float64Array.from(scaled, (z) => (z < least ? 0 : Math.exp(z - highest)));
  const total = probabilities.reduce((a, b) => a + b);
  for (let i = 0; i < probabilities.length; i++) probabilities[i] /= total;
  if (sampling.top_p < 1) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    let sum = 0;
    for (const id of order) {
      const p = probabilities[id];
      sum += p;
      if (sum - p >= sampling.top_p) probabilities[id] = 0;
    }
  }
  if (sampling.min_p > 0) {
    const limit = probabilities.reduce((a, b) => Math.max(a, b)) * sampling.min_p;
    for (let i = 0; i < probabilities.length; i++) if (probabilities[i] < limit) probabilities[i] = 0;
  }
  return probabilities;
}

// Return logits in which the characters of the context (ids) are less likely (Keskar et al. 2019).
function penalize(logits, context, penalty) {
  const result = logits.slice(), factor = Math.fround(penalty);
  for (const id of new Set(context)) result[id] = logits[id] > 0 ? logits[id] / factor : logits[id] * factor;
  return result;
}

// Return the id of the most likely character.
function argmax(logits) {
  return logits.reduce((best, z, id) => (z > logits[best] ? id : best), 0);
}

// Choose a character: the quantile `uniform`, in [0, 1), of the distribution.
function choose(logits, sampling, uniform) {
  if (!sampling.temperature) return argmax(logits);
  const probabilities = filterProbabilities(logits, sampling);
  const target = uniform * probabilities.reduce((a, b) => a + b);
  let sum = 0;
  const id = probabilities.findIndex((p) => (sum += p) > target);
  return id < 0 ? probabilities.length - 1 : id;
}

// Yield the same numbers in [0, 1) as NumPy's generator Philox4x64-10 (Salmon et al. 2011) with the key
// [seed, sample]. A seed above 2^53 must be given as text or BigInt.
function* uniforms(seed, sample = 0) {
  const low = (n) => BigInt.asUintN(64, n);
  for (let counter = 1n; ; counter++) {
    let [a, b, c, d] = [counter, 0n, 0n, 0n], key = [low(BigInt(seed)), low(BigInt(sample))];
    for (let round = 0; round < 10; round++) {
      const left = a * 0xd2e7470ee14c6c93n, right = c * 0xca5a826395121157n;
      [a, b, c, d] = [(right >> 64n) ^ b ^ key[0], low(right), (left >> 64n) ^ d ^ key[1], low(left)];
      key = [low(key[0] + 0x9e3779b97f4a7c15n), low(key[1] + 0xbb67ae8584caa73bn)];
    }
    for (const word of [a, b, c, d]) yield (Number(word) / 2 ** 64) * (1 - 2 ** -53);
  }
}

// A model that writes: the same text as `minigpt write` with the same seed and settings, for float32 weights.
class Writer {
  // `sampling` has the fields of the section `sample` of params.yaml.
  constructor(gpt, sampling) {
    if (sampling.overflow === "roll" && gpt.config.positions === "learned") {
      throw new Error("overflow: roll needs rotary positions, but this model has learned ones; use reread");
    }
    Object.assign(this, { gpt, sampling, cache: gpt.makeCache() });
  }

  // Begin after the characters `ids`, at least one. A text that continues has used `drawn` numbers of this seed.
  start(ids, drawn = 0) {
    if (!ids.length) throw new Error("the prompt is empty; the model needs at least one character to continue");
    this.ids = Array.from(ids);
    this.uniforms = uniforms(this.sampling.seed);
    for (let i = 0; i < drawn; i++) this.uniforms.next();
    this.drawn = drawn;
    this.first = this.sampling.overflow === "roll" ? 0 : Math.max(0, ids.length - this.gpt.config.block_size);
    this.cache.clear();
  }

  // Write a character, and return its id and the logits of the model.
  next() {
    const { sampling, ids } = this, context = this.gpt.config.block_size;
    const logits = this.read();
    let adjusted = logits;
    if (sampling.repetition_penalty !== 1) {
      adjusted = penalize(logits, ids.slice(-context), sampling.repetition_penalty);
    }
    const id = choose(adjusted, sampling, this.uniforms.next().value);
    this.drawn++;
    ids.push(id);
    return { id, logits };
  }

  // Read the characters that are not in the cache, and return the logits of the next one.
  read() {
    while (this.readAhead());
    return this.gpt.forward(this.ids.at(-1), this.cache);
  }

  // Read one of the characters before the last, and return whether there was one: a page can draw itself between two
  // calls. When the context is full, `reread` starts again with its last half, and `slide` with all but its first
  // character; `roll` never starts again.
  readAhead() {
    const { sampling, ids, cache } = this, context = this.gpt.config.block_size;
    if (sampling.overflow !== "roll" && ids.length - this.first > context) {
      this.first = ids.length - (sampling.overflow === "slide" ? context : Math.max(1, Math.floor(context / 2)));
      cache.clear();
    }
    const next = this.first + cache.length;
    if (next >= ids.length - 1) return false;
    this.gpt.forward(ids[next], cache);
    return true;
  }
}
