package pool

import (
	"bytes"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/region"
)

// A large section comes some time after it was asked for, and what was there before it has
// gone by then; a small one is there at once; what is given up leaves nothing behind.
func TestSectionsCome(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	defer r.shut()
	q := r.Pool.region
	const large, small = readyBytes + 1, 1 << 20
	await := func(c *coming) (a arrival) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if !c.underWay() {
				t.Fatal("nothing is under way")
			}
			if a, ok := c.take(); ok {
				if a.err != nil || c.underWay() {
					t.Fatalf("%v, under way: %v", a.err, c.underWay())
				}
				return a
			}
			if time.Now().After(end) {
				t.Fatal("the section does not come")
			}
		}
	}
	sections := func(want int) {
		t.Helper()
		if got := q.Sections(foreign); len(got) != want {
			t.Errorf("there are %d sections, want %d: %v", len(got), want, got)
		}
	}
	var c coming
	if _, ok := c.take(); ok || c.underWay() {
		t.Error("a section has come that nobody asked for")
	}
	c.begin(q, foreign, small, nil)
	a, ok := c.take()
	if !ok || a.err != nil || len(a.mem) < small {
		t.Fatalf("a small section is not there at once: %v, %v", ok, a.err)
	}
	sections(1)
	c.begin(q, foreign, large, []region.Section{a.section})
	a = await(&c)
	sections(1)
	if len(a.mem) < large || len(bytes.Trim(a.mem, "\x00")) > 0 {
		t.Errorf("the section has %d bytes, or they are not all zero", len(a.mem))
	}
	for range 3 { // given up under way, or just come
		c.begin(q, foreign, large, nil)
		if err := c.cancel(q); err != nil || c.underWay() {
			t.Errorf("%v, under way: %v", err, c.underWay())
		}
		sections(1)
	}
	c.begin(q, foreign, large, nil)
	for len(q.Sections(foreign)) == 1 { // it has come, and nobody has taken it
		time.Sleep(time.Millisecond)
	}
	if err := c.end(q); err != nil {
		t.Error(err)
	}
	sections(1)
	if c.begin(q, foreign, small, nil); c.underWay() {
		t.Error("something is under way after the end")
	}
	c = coming{}
	c.begin(q, foreign, 1<<50, nil) // refused at once by the region, whoever waits
	for c.underWay() {
		if a, ok := c.take(); ok && a.err == nil {
			t.Errorf("a section of %d bytes has come", len(a.mem))
		}
	}
	if err := q.RemoveSection(a.section); err != nil {
		t.Error(err)
	}
}
