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

// How a pixel weighs the cells of the window around its own: (cells), 0 beyond the window. The upsampled vector is their
// weighted mean, so the weights of sum 1 that come nearest to it are those: with the differences of the cells' vectors
// from it as columns D, the solution of (D'D) a = 1, scaled to sum 1.
export function attention(map, channels, [h, w], dense, [height, width], { x, y }, radius) {
  const middle = [Math.floor(((2 * y + 1) * h) / (2 * height)), Math.floor(((2 * x + 1) * w) / (2 * width))];
  const window = [];
  for (let row = Math.max(0, middle[0] - radius); row <= Math.min(h - 1, middle[0] + radius); row++) {
    for (let column = Math.max(0, middle[1] - radius); column <= Math.min(w - 1, middle[1] + radius); column++) {
      window.push(row * w + column);
    }
  }
  const count = window.length;
  const differences = window.map((cell) =>
    Float64Array.from({ length: channels }, (_, c) => map[c * h * w + cell] - dense[c * height * width + y * width + x]),
  );
  const matrix = differences.map((a) =>
    Float64Array.from(differences, (b) => a.reduce((sum, value, c) => sum + value * b[c], 0)),
  );
  const trace = matrix.reduce((sum, row, i) => sum + row[i], 0);
  for (let i = 0; i < count; i++) matrix[i][i] += 1e-9 * trace + 1e-30; // equal cells share their weight
  // Cholesky's factors in the lower half; then forward and back.
  const solution = new Float64Array(count).fill(1);
  for (let i = 0; i < count; i++) {
    for (let j = 0; j <= i; j++) {
      let rest = matrix[i][j];
      for (let k = 0; k < j; k++) rest -= matrix[i][k] * matrix[j][k];
      matrix[i][j] = i === j ? Math.sqrt(Math.max(rest, 1e-300)) : rest / matrix[j][j];
    }
    for (let k = 0; k < i; k++) solution[i] -= matrix[i][k] * solution[k];
    solution[i] /= matrix[i][i];
  }
  for (let i = count - 1; i >= 0; i--) {
    for (let k = i + 1; k < count; k++) solution[i] -= matrix[k][i] * solution[k];
    solution[i] /= matrix[i][i];
  }
  const total = solution.reduce((sum, value) => sum + value, 0);
  const result = new Float32Array(h * w);
  window.forEach((cell, i) => (result[cell] = Math.max(0, solution[i] / total)));
  return result;
}

// A photograph, RGBA bytes of [height, width], in grey, with its (h, w) cells orange by their weights.
export function glow(pixels, [height, width], weights, [h, w]) {
  const result = new Uint8ClampedArray(pixels.length).fill(255);
  const most = weights.reduce((largest, value) => Math.max(largest, value), 1e-12);
  for (let i = 0; i < height * width; i++) {
    const [row, column] = [Math.floor((Math.floor(i / width) * h) / height), Math.floor(((i % width) * w) / width)];
    const opacity = (0.8 * weights[row * w + column]) / most;
    const grey = 0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2];
    [255, 120, 0].forEach((value, k) => (result[4 * i + k] = opacity * value + (1 - opacity) * grey));
  }
  return result;
}
