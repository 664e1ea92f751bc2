"use strict";
// Ticks of an axis, and numbers in words.

const SECOND_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

/** The smallest 1, 2 or 5 times a power of ten that cuts a span into at most `most` parts. */
function roundStep(span, most) {
  const least = span / most, power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least * (1 - 1e-9));
}

function multiples(low, high, step) {
  const ticks = [];
  for (let count = Math.ceil(low / step - 1e-9); count * step <= high + step * 1e-9; count++) ticks.push(count * step);
  return ticks;
}

/** {ticks, text}: at most some `most` round values from low to high, and how to write one. kind: number, whole, seconds, share. */
function linearAxis(low, high, most, kind) {
  const span = high - low;
  let step = roundStep(span, most);
  if (kind === "whole") step = Math.max(1, step);
  if (kind === "seconds") {
    const least = span / most;
    step = least < 1 ? step : SECOND_STEPS.find((other) => other >= least) ?? 86400 * roundStep(span / 86400, most);
  }
  const ticks = multiples(low, high, step);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return { ticks, text: (value) => tickText(value, step, largest, kind) };
}

/** The same for a logarithmic axis: powers of ten, with 2 and 5 where there are few, or round values within one power. */
function logAxis(low, high, most, kind) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), powers = Math.log10(high / low);
  const every = Math.max(1, Math.ceil(powers / most));
  let ticks = [];
  for (const factors of [[1], [1, 2, 5]]) {
    if (ticks.length >= 3) break;
    ticks = [];
    for (let power = first; power <= last; power += every) for (const factor of factors) ticks.push(factor * 10 ** power);
    ticks = ticks.filter((tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9));
  }
  if (ticks.length < 3 && powers < 2) return linearAxis(low, high, most, kind);
  return { ticks, text: (value) => tickText(value, value, value, kind) };
}

function tickText(value, step, largest, kind) {
  const places = (size) => Math.min(12, Math.max(0, -Math.floor(Math.log10(size) + 1e-9)));
  if (kind === "seconds") return secondsText(value, step);
  if (kind === "share") return `${(100 * value).toFixed(places(100 * step))} %`;
  if (Math.abs(value) < step * 1e-6) return "0";
  if (largest >= 1e4) {
    const [size, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => largest >= size);
    return (value / size).toFixed(places(step / size)) + letter;
  }
  if (largest < 1e-3) {
    return Number(value.toPrecision(3)).toExponential();
  }
  return value.toFixed(places(step));
}

/** Seconds as 12 s, 3 min 20 s, 2 h 5 min, 1 d 3 h; parts smaller than the step are left out. */
function secondsText(seconds, step = 1) {
  if (Math.abs(seconds) < 60) return `${Number(seconds.toFixed(step < 1 || seconds < 10 ? 2 : 0))} s`;
  const parts = [];
  let rest = Math.round(seconds);
  for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count) parts.push(`${count} ${name}`);
  }
  return parts.slice(0, 2).join(" ");
}

const wholeText = (value) => Math.round(value).toLocaleString("en-US");

/** A value with five significant digits. */
function valueText(value, kind) {
  if (kind === "share") return `${Number((100 * value).toPrecision(4))} %`;
  const size = Math.abs(value);
  if (size >= 1e5) return wholeText(value);
  return size >= 1e-3 || size === 0 ? String(Number(value.toPrecision(5))) : value.toExponential(3);
}
