package main

import (
	"fmt"
	"html"
	"maps"
	"math"
	"slices"
	"strings"
)

// A palette is the colours of one kind of viewer.
type palette struct {
	back, ink, dim, grid string
	keys                 map[string]string // class of a mark to its colour
}

var (
	light = palette{"#ffffff", "#1f2328", "#59636e", "#d8dee4", map[string]string{
		"a": "#0969da", "b": "#bf5b04", "c": "#818b98", "good": "#1a7f37", "bad": "#bf5b04"}}
	dark = palette{"#0d1117", "#e6edf3", "#9198a1", "#30363d", map[string]string{
		"a": "#58a6ff", "b": "#f0883e", "c": "#8d96a0", "good": "#3fb950", "bad": "#db8a3d"}}
)

// rules are a palette in CSS. No variables: not every viewer knows them.
func (p palette) rules() string {
	var b strings.Builder
	fmt.Fprintf(&b, "text{fill:%s} .dim{fill:%s} .bg{fill:%s} .grid{stroke:%s} .want{stroke:%s}\n", p.ink, p.dim, p.back, p.grid, p.ink)
	for _, k := range slices.Sorted(maps.Keys(p.keys)) {
		fmt.Fprintf(&b, ".fill.%[1]s{fill:%[2]s} .line.%[1]s,.thin.%[1]s{stroke:%[2]s}\n", k, p.keys[k])
	}
	return b.String()
}

// style serves light viewers, and dark ones that say so.
func style() string {
	return "<style>\ntext{font:12px system-ui,sans-serif} .title{font-weight:600;font-size:14px} .grid{stroke-width:1}\n" +
		".want,.thin{stroke-width:2} .line{fill:none;stroke-width:1.6}\n" + light.rules() +
		"@media (prefers-color-scheme:dark){\n" + dark.rules() + "}\n</style>\n"
}

// canvas collects the elements of one picture. Coordinates are pixels.
type canvas struct {
	width, height float64
	b             strings.Builder
}

func newCanvas(width, height float64, title string) *canvas {
	c := &canvas{width: width, height: height}
	fmt.Fprintf(&c.b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" width="%g" height="%g" role="img" aria-label="%s">`+"\n",
		width, height, width, height, html.EscapeString(title))
	c.b.WriteString(style())
	fmt.Fprintf(&c.b, `<rect class="bg" width="%g" height="%g"/>`+"\n", width, height)
	c.text(16, 24, "title", "start", title)
	return c
}

func (c *canvas) text(x, y float64, class, anchor, s string) {
	fmt.Fprintf(&c.b, `<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(s))
}

func (c *canvas) line(x1, y1, x2, y2 float64, class string) {
	fmt.Fprintf(&c.b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" class="%s"/>`+"\n", x1, y1, x2, y2, class)
}

func (c *canvas) rect(x, y, w, h float64, class string) {
	fmt.Fprintf(&c.b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" class="%s"/>`+"\n", x, y, w, h, class)
}

func (c *canvas) dot(x, y, r float64, class string) {
	fmt.Fprintf(&c.b, `<circle cx="%.1f" cy="%.1f" r="%g" class="%s"/>`+"\n", x, y, r, class)
}

// curve draws points that are joined by lines.
func (c *canvas) curve(xs, ys []float64, class string) {
	var p strings.Builder
	for i := range xs {
		fmt.Fprintf(&p, "%.1f,%.1f ", xs[i], ys[i])
	}
	fmt.Fprintf(&c.b, `<polyline points="%s" class="line %s"/>`+"\n", strings.TrimSpace(p.String()), class)
}

// legend explains colours, from x on.
func (c *canvas) legend(x, y float64, entries ...[2]string) {
	for _, e := range entries {
		c.rect(x, y-9, 10, 10, "fill "+e[0])
		c.text(x+15, y, "dim", "start", e[1])
		x += 36 + 7.2*float64(len(e[1]))
	}
}

func (c *canvas) bytes() []byte { return []byte(c.b.String() + "</svg>\n") }

// axis maps values to pixels.
type axis struct {
	from, to   float64 // values
	start, end float64 // pixels
	log        bool
}

func (a axis) at(v float64) float64 {
	f := func(x float64) float64 { return x }
	if a.log {
		f = math.Log
		v = max(v, a.from)
	}
	return a.start + (f(min(v, a.to))-f(a.from))/(f(a.to)-f(a.from))*(a.end-a.start)
}

// ticks are round values within the axis: powers of ten, or at most six steps
// of 1, 2 or 5.
func (a axis) ticks() (t []float64) {
	if a.log {
		for v := math.Pow(10, math.Ceil(math.Log10(a.from))); v <= a.to; v *= 10 {
			t = append(t, v)
		}
		return t
	}
	step := math.Pow(10, math.Floor(math.Log10((a.to-a.from)/6)))
	for _, m := range []float64{1, 2, 5, 10} {
		if (a.to-a.from)/(step*m) <= 6 {
			step *= m
			break
		}
	}
	for n := math.Ceil(a.from / step); n*step <= a.to*1.0001; n++ {
		t = append(t, n*step)
	}
	return t
}
