// Loss and speed over steps, by uPlot.

const INK = () => getComputedStyle(document.documentElement).getPropertyValue("color");
const DIM = "#8a94a0";

export class Chart {
  // `lines`: [{name, colour, key, scale?, points?}] over the column "step".
  constructor(place, lines, axes) {
    this.lines = lines;
    this.marks = [];
    this.data = [[], ...lines.map(() => [])];
    const options = {
      width: place.clientWidth || 480, height: 220, legend: { live: true },
      scales: { x: { time: false } },
      series: [{ label: "step" }, ...lines.map((line) => ({
        label: line.name, stroke: line.colour, width: 1.5, scale: line.scale || "y", spanGaps: true,
        points: { show: line.points ? true : undefined },
      }))],
      axes: [{ stroke: INK, grid: { stroke: `${DIM}40` } }, ...axes.map((axis) => ({
        stroke: INK, grid: { stroke: axis.side === 1 ? "transparent" : `${DIM}40` }, scale: axis.scale, side: axis.side ?? 3, label: axis.label, size: 64,
      }))],
      hooks: { draw: [(plot) => this.drawMarks(plot)] },
    };
    this.plot = new uPlot(options, this.data, place);
    new ResizeObserver(() => this.plot.setSize({ width: place.clientWidth, height: 220 })).observe(place);
  }

  show(columns, marks) {
    this.marks = marks;
    this.data = [columns.step, ...this.lines.map((line) => columns[line.key] || columns.step.map(() => null))];
    this.plot.setData(this.data);
  }

  drawMarks(plot) {
    const context = plot.ctx;
    context.save();
    context.strokeStyle = DIM;
    context.setLineDash([4, 4]);
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.step, "x", true);
      if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
      context.beginPath();
      context.moveTo(x, plot.bbox.top);
      context.lineTo(x, plot.bbox.top + plot.bbox.height);
      context.stroke();
    }
    context.restore();
  }
}
