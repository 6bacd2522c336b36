package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/bench/through"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

const (
	roundLimit = time.Minute
	healLimit  = 30 * time.Second
	// settle is how many replies end the look at a fault: then whoever serves
	// does so, and not only the first request.
	settle = 50
	// The fault comes this long after the load, at random, so that it meets
	// every phase of a consistency point.
	minDelay, maxDelay = 50 * time.Millisecond, 350 * time.Millisecond
)

// fault is one case.
type fault struct {
	name   string
	title  string
	signal unix.Signal
	rounds int
	busy   bool
	qemu   bool
}

// side is a guest whose failures one policy answers.
type side struct {
	guest string
	kind  string // what follows a failure, as the pair reports it
	after string // put after the names of cases
	title string // and their titles
}

// sides are the guests, by their policies.
var sides = map[string]side{
	config.TakeoverFirst: {guest: "a", kind: control.KindTakeover},
	config.RestartFirst:  {guest: "b", kind: control.KindResumed, after: "-restart", title: ", restart first"},
}

// bench measures one pair.
type bench struct {
	options
	pair   *pair.Pair
	report *report
	sides  []side
}

func (b *bench) cases() []fault {
	return []fault{
		{name: caseKill, title: "kill -9", signal: unix.SIGKILL, rounds: b.rounds},
		{name: caseHang, title: "SIGSTOP", signal: unix.SIGSTOP, rounds: b.hangs},
		{name: "busy", title: "kill -9 under load", signal: unix.SIGKILL, rounds: b.busy, busy: true},
		{name: "qemu", title: "kill -9, QEMU's client", signal: unix.SIGKILL, rounds: b.qemu, qemu: true},
	}
}

// run measures a case on volumes of its own, by turns on each side. The clients of
// the other side rest meanwhile.
func (b *bench) run(ctx context.Context, f fault) (err error) {
	if f.rounds == 0 {
		return nil
	}
	var all []*clients
	defer func() {
		for _, c := range all {
			err = errors.Join(err, c.stop())
		}
	}()
	for _, s := range b.sides {
		c, err := b.clients(ctx, f, s)
		if c != nil {
			all = append(all, c)
		}
		if err != nil {
			return err
		}
	}
	rng := rand.New(rand.NewPCG(b.seed, 0))
	for n := range f.rounds {
		for _, c := range all {
			c.work()
			err := b.round(ctx, f, c, rng)
			c.rest()
			if err != nil {
				return fmt.Errorf("round %d of guest %s: %w", n+1, c.guest, err)
			}
			last := c.res.Samples[len(c.res.Samples)-1]
			fmt.Fprintf(os.Stderr, "%-12s %3d/%d  pause %7.1f ms, noticed %4.1f %s %6.1f ms, longest later gap %5.1f ms, %s %v\n",
				c.res.Name, n+1, f.rounds, last.Pause, last.Noticed, c.kind, last.Total, last.After, last.First, last.Steps)
		}
	}
	return nil
}

// clients are those of one side in one case. They rest at first.
type clients struct {
	side
	res, back *result
	qemu      *through.Client
	probe     *probe
	load      *load
}

func (b *bench) clients(ctx context.Context, f fault, s side) (*clients, error) {
	c := &clients{side: s, res: b.report.add(f.name+s.after, f.title+s.title)}
	uri, err := b.volume(ctx, s.guest, "probe-"+f.name+"-"+s.guest, probeBlocks*blockSize)
	if err != nil {
		return c, err
	}
	if f.qemu {
		if c.qemu, err = through.Start(ctx, through.QEMU, filepath.Join(b.pair.Dir, "qemu-"+s.guest+".sock"), uri); err != nil {
			return c, err
		}
		uri = c.qemu.URI
	}
	if c.probe, err = startProbe(uri, b.seed); err != nil {
		return c, err
	}
	if f.busy {
		if uri, err = b.volume(ctx, s.guest, "load-"+s.guest, loadSize); err != nil {
			return c, err
		}
		if c.load, err = startLoad(uri, b.seed); err != nil {
			return c, err
		}
	}
	if f.name == caseKill && s.kind == control.KindTakeover {
		c.back = b.report.add("giveback", "giveback, planned")
	}
	return c, nil
}

func (c *clients) work() {
	c.probe.gate.open()
	if c.load != nil {
		c.load.resume()
	}
}

func (c *clients) rest() {
	c.probe.gate.shut()
	if c.load != nil {
		c.load.rest()
	}
}

// stop ends clients that rest.
func (c *clients) stop() (err error) {
	if c.load != nil {
		c.res.LoadIOPS, err = c.load.stop()
	}
	if c.probe != nil {
		err = errors.Join(err, c.probe.stop())
	}
	if c.qemu != nil {
		err = errors.Join(err, c.qemu.Stop())
	}
	return err
}

// volume makes a volume and returns where it is served.
func (b *bench) volume(ctx context.Context, guest, name string, size int64) (string, error) {
	if _, err := b.pair.Do(ctx, "volume", "create", name, "--size", fmt.Sprint(size), "--guest", guest); err != nil {
		return "", err
	}
	e, err := b.pair.Export(ctx, name)
	if b.tcp {
		return e.NBD, err
	}
	return e.NBDUnix, err
}

// ready is a complaint about a status as [pair.Well], and about guests whose next
// processes are not ready: those that fail twice within a second are not looked at.
func ready(st control.Status) string {
	for _, g := range st.Guests {
		if !g.Spare {
			return fmt.Sprintf("guest %s has no spare process", g.Name)
		}
	}
	return pair.Well(st)
}

// round hurts the guest once, waits until it is well, and gives back what was taken
// over.
func (b *bench) round(ctx context.Context, f fault, c *clients, rng *rand.Rand) error {
	ctx, cancel := context.WithTimeoutCause(ctx, roundLimit, fmt.Errorf("the round took longer than %v: %w", roundLimit, context.DeadlineExceeded))
	defer cancel()
	if err := b.pair.Until(ctx, healLimit, ready); err != nil {
		return err
	}
	h, err := b.pair.HoldGuest(ctx, c.guest)
	if err != nil {
		return err
	}
	defer h.Close()
	hurt := func() error { return h.Signal(f.signal) }
	s, err := b.change(ctx, f, c, rng, c.kind, hurt)
	if err != nil {
		return err
	}
	c.res.Samples = append(c.res.Samples, s)
	if !h.Ended() {
		return fmt.Errorf("process %d was replaced and lives", h.PID)
	}
	if err := b.pair.Until(ctx, healLimit, pair.Well); err != nil || c.kind == control.KindResumed {
		return err
	}
	s, err = b.change(ctx, f, c, rng, control.KindGiveback, func() error {
		_, err := b.pair.Client().Giveback(ctx, c.guest)
		return err
	})
	if err != nil {
		return err
	}
	if c.back != nil {
		c.back.Samples = append(c.back.Samples, s)
	}
	return nil
}

// change does something that brings another guest to serve the probe, at a
// random moment, and returns what the probe saw of it.
func (b *bench) change(ctx context.Context, f fault, c *clients, rng *rand.Rand, kind string, do func() error) (sample, error) {
	p := c.probe
	if err := p.awaitReplies(ctx, settle); err != nil {
		return sample{}, err
	}
	select {
	case <-time.After(minDelay + time.Duration(rng.Int64N(int64(maxDelay-minDelay)))):
	case <-ctx.Done():
		return sample{}, context.Cause(ctx)
	}
	p.begin()
	began := time.Now()
	if err := do(); err != nil {
		return sample{}, err
	}
	// The pair is left alone until the probe is through: asking for its status
	// costs time too. Behind QEMU the probe cannot tell, and the pair must.
	if !f.qemu {
		if err := p.await(ctx, func(w watch) bool { return w.pause > 0 }); err != nil {
			return sample{}, err
		}
	}
	var took control.Takeover
	err := b.pair.Until(ctx, healLimit, func(st control.Status) string {
		t := st.LastTakeover
		if t == nil || t.Kind != kind || t.Of != c.guest || t.Started.Before(began.Truncate(time.Millisecond)) {
			return fmt.Sprintf("no %s of %s in the status", kind, c.guest)
		}
		took = *t
		return ""
	})
	if err != nil {
		return sample{}, err
	}
	if took.Error != "" {
		return sample{}, fmt.Errorf("%s of %s: %s", kind, c.guest, took.Error)
	}
	if err := p.awaitReplies(ctx, settle); err != nil {
		return sample{}, err
	}
	w := p.seen()
	s := sample{Pause: ms(w.pause), After: ms(w.after), First: w.first, Total: ms(time.Duration(took.Total)), Noticed: ms(took.Started.Sub(began))}
	if f.qemu {
		s.Pause, s.After = ms(w.longest), 0
	}
	for _, step := range took.Steps {
		s.Steps = append(s.Steps, namedTime{step.Name, ms(time.Duration(step.Took))})
	}
	return s, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
