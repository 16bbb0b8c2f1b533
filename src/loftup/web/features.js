// Arithmetic on feature maps. Maps are Float32Array in the order (channel, row, column).

// Mean and the first three principal components of a map (channels, cells), each with its sign fixed so that its
// largest weight is positive: {mean, axes}.
export function principalComponents(map, channels, cells) {
  const mean = new Float64Array(channels);
  for (let c = 0; c < channels; c++) {
    let sum = 0;
    for (let i = 0; i < cells; i++) sum += map[c * cells + i];
    mean[c] = sum / cells;
  }
  const covariance = new Float64Array(channels * channels);
  for (let a = 0; a < channels; a++) {
    for (let b = a; b < channels; b++) {
      let sum = 0;
      for (let i = 0; i < cells; i++) sum += (map[a * cells + i] - mean[a]) * (map[b * cells + i] - mean[b]);
      covariance[a * channels + b] = covariance[b * channels + a] = sum / cells;
    }
  }
  const axes = [];
  for (let k = 0; k < 3; k++) {
    let axis = Float64Array.from({ length: channels }, (_, c) => 1 + Math.sin(c * (k + 1)));
    for (let step = 0; step < 400; step++) {
      const next = new Float64Array(channels);
      for (let a = 0; a < channels; a++) {
        let sum = 0;
        for (let b = 0; b < channels; b++) sum += covariance[a * channels + b] * axis[b];
        next[a] = sum;
      }
      for (const other of axes) {
        let along = 0;
        for (let c = 0; c < channels; c++) along += next[c] * other[c];
        for (let c = 0; c < channels; c++) next[c] -= along * other[c];
      }
      const length = Math.sqrt(next.reduce((sum, value) => sum + value * value, 0)) || 1;
      let moved = 0;
      for (let c = 0; c < channels; c++) {
        moved = Math.max(moved, Math.abs(next[c] / length - axis[c]));
        next[c] /= length;
      }
      axis = next;
      if (moved < 1e-9) break;
    }
    let largest = 0;
    for (let c = 0; c < channels; c++) if (Math.abs(axis[c]) > Math.abs(axis[largest])) largest = c;
    if (axis[largest] < 0) axis = axis.map((value) => -value);
    axes.push(axis);
  }
  return { mean, axes };
}

// A map in a basis of principalComponents: (3, cells).
export function project(map, channels, cells, basis) {
  const result = new Float32Array(3 * cells);
  basis.axes.forEach((axis, k) => {
    let constant = 0;
    for (let c = 0; c < channels; c++) constant -= axis[c] * basis.mean[c];
    const out = result.subarray(k * cells, (k + 1) * cells).fill(constant);
    for (let c = 0; c < channels; c++) {
      const weight = axis[c];
      const row = map.subarray(c * cells, (c + 1) * cells);
      for (let i = 0; i < cells; i++) out[i] += weight * row[i];
    }
  });
  return result;
}

// Bilinear interpolation with the cells' centres in the middle of their patches, as torch's align_corners=False.
export function enlarge(map, channels, [h, w], [height, width]) {
  const result = new Float32Array(channels * height * width);
  const axis = (length, cells) =>
    Array.from({ length }, (_, i) => {
      const place = Math.min(Math.max(((i + 0.5) * cells) / length - 0.5, 0), cells - 1);
      const first = Math.floor(place);
      return [first, Math.min(first + 1, cells - 1), place - first];
    });
  const rows = axis(height, h);
  const columns = axis(width, w);
  for (let c = 0; c < channels; c++) {
    const base = c * h * w;
    let out = c * height * width;
    for (const [top, bottom, down] of rows) {
      for (const [left, right, across] of columns) {
        const above = map[base + top * w + left] * (1 - across) + map[base + top * w + right] * across;
        const below = map[base + bottom * w + left] * (1 - across) + map[base + bottom * w + right] * across;
        result[out++] = above * (1 - down) + below * down;
      }
    }
  }
  return result;
}

// Lengths of the vectors of a map: (cells).
export function lengths(map, channels, cells) {
  const result = new Float32Array(cells);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < cells; i++) result[i] += map[c * cells + i] ** 2;
  }
  return result.map(Math.sqrt);
}

// Cosine of the vector at one place with all vectors of a map: (cells).
export function similarity(map, channels, cells, norms, place) {
  const result = new Float32Array(cells);
  for (let c = 0; c < channels; c++) {
    const value = map[c * cells + place];
    const row = map.subarray(c * cells, (c + 1) * cells);
    for (let i = 0; i < cells; i++) result[i] += value * row[i];
  }
  for (let i = 0; i < cells; i++) result[i] /= Math.max(norms[i] * norms[place], 1e-12);
  return result;
}

// The range of every colour of a (3, cells) map, from its 1st to its 99th percentile: [[low, high], ...].
export function ranges(map, cells) {
  return [0, 1, 2].map((k) => {
    const sorted = map.slice(k * cells, (k + 1) * cells).sort();
    return [sorted[Math.floor(0.01 * (cells - 1))], sorted[Math.ceil(0.99 * (cells - 1))]];
  });
}

// A (3, cells) map as RGBA bytes, in ranges.
export function colours(map, cells, limits) {
  const pixels = new Uint8ClampedArray(4 * cells).fill(255);
  for (let k = 0; k < 3; k++) {
    const [low, high] = limits[k];
    for (let i = 0; i < cells; i++) pixels[4 * i + k] = (255 * (map[k * cells + i] - low)) / Math.max(high - low, 1e-12);
  }
  return pixels;
}

const STOPS = [[20, 11, 53], [101, 21, 110], [188, 55, 84], [237, 105, 37], [251, 180, 26], [252, 254, 200]];

// A map in [low, 1] as RGBA bytes, dark to bright.
export function heat(map, low) {
  const pixels = new Uint8ClampedArray(4 * map.length).fill(255);
  for (let i = 0; i < map.length; i++) {
    const place = Math.min(Math.max((map[i] - low) / Math.max(1 - low, 1e-6), 0), 1) * (STOPS.length - 1);
    const first = Math.min(Math.floor(place), STOPS.length - 2);
    for (let k = 0; k < 3; k++) {
      pixels[4 * i + k] = STOPS[first][k] + (STOPS[first + 1][k] - STOPS[first][k]) * (place - first);
    }
  }
  return pixels;
}
