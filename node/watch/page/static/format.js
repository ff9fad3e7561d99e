// Figures in words, as the terminal's live view writes them.

export function rate(bps) {
  if (bps === null || bps === undefined) return "unlimited";
  if (bps === 0) return "cut";
  const [unit, size] = bps >= 1e9 ? ["Gbit/s", 1e9] : bps >= 1e6 ? ["Mbit/s", 1e6] : ["kbit/s", 1e3];
  return `${+(bps / size).toPrecision(3)} ${unit}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1 ? `${value.toFixed(2)} s` : `${(1e3 * value).toFixed(0)} ms`;
}

export function duration(value) {
  if (value === null || value === undefined) return "–";
  const whole = Math.round(value);
  const parts = [Math.floor(whole / 60) % 60, whole % 60].map((part) => String(part).padStart(2, "0"));
  return whole >= 3600 ? `${Math.floor(whole / 3600)}:${parts.join(":")}` : parts.join(":");
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(share > 0.9 ? 1 : 0)} %`;
}

export function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function bytes(value) {
  return value === null || value === undefined ? "–" : `${(value / 1e6).toFixed(0)} MB`;
}
