package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

const (
	guest      = "a" // whose identity is measured
	roundLimit = time.Minute
	healLimit  = 30 * time.Second
	// settle is how many replies end the look at a fault: then the survivor
	// serves, and not only its first request.
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

// bench measures one pair.
type bench struct {
	options
	pair   *pair.Pair
	report *report
}

func (b *bench) cases() []fault {
	return []fault{
		{name: caseKill, title: "kill -9", signal: unix.SIGKILL, rounds: b.rounds},
		{name: caseHang, title: "SIGSTOP", signal: unix.SIGSTOP, rounds: b.hangs},
		{name: "busy", title: "kill -9 under load", signal: unix.SIGKILL, rounds: b.busy, busy: true},
		{name: "qemu", title: "kill -9, QEMU's client", signal: unix.SIGKILL, rounds: b.qemu, qemu: true},
	}
}

// run measures a case on a volume of its own.
func (b *bench) run(ctx context.Context, f fault) (err error) {
	if f.rounds == 0 {
		return nil
	}
	uri, err := b.volume(ctx, "probe-"+f.name, probeBlocks*blockSize)
	if err != nil {
		return err
	}
	if f.qemu {
		q, err := startQEMU(ctx, b.pair.Dir, uri)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, q.stop()) }()
		uri = q.uri
	}
	p, err := startProbe(uri, b.seed)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	res := b.report.add(f.name, f.title)
	if f.busy {
		uri, err := b.volume(ctx, "load", loadSize)
		if err != nil {
			return err
		}
		l, err := startLoad(uri, b.seed)
		if err != nil {
			return err
		}
		defer func() {
			var lerr error
			res.LoadIOPS, lerr = l.stop()
			err = errors.Join(err, lerr)
		}()
	}
	var back *result
	if f.name == caseKill {
		back = b.report.add("giveback", "giveback, planned")
	}
	rng := rand.New(rand.NewPCG(b.seed, 0))
	for n := range f.rounds {
		if err := b.round(ctx, f, p, rng, res, back); err != nil {
			return fmt.Errorf("round %d: %w", n+1, err)
		}
		last := res.Samples[len(res.Samples)-1]
		fmt.Fprintf(os.Stderr, "%-8s %3d/%d  pause %7.1f ms, noticed %4.1f takeover %6.1f ms, longest later gap %5.1f ms, %s %v\n",
			f.name, n+1, f.rounds, last.Pause, last.Noticed, last.Total, last.After, last.First, last.Steps)
	}
	return nil
}

// volume makes a volume and returns where it is served.
func (b *bench) volume(ctx context.Context, name string, size int64) (string, error) {
	if _, err := b.pair.Do(ctx, "volume", "create", name, "--size", fmt.Sprint(size), "--guest", guest); err != nil {
		return "", err
	}
	e, err := b.pair.Export(ctx, name)
	if b.tcp {
		return e.NBD, err
	}
	return e.NBDUnix, err
}

// round hurts the guest once, waits until it is well, and gives back.
func (b *bench) round(ctx context.Context, f fault, p *probe, rng *rand.Rand, res, back *result) error {
	ctx, cancel := context.WithTimeoutCause(ctx, roundLimit, fmt.Errorf("the round took longer than %v: %w", roundLimit, context.DeadlineExceeded))
	defer cancel()
	if err := b.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return err
	}
	h, err := b.pair.HoldGuest(ctx, guest)
	if err != nil {
		return err
	}
	defer h.Close()
	hurt := func() error { return h.Signal(f.signal) }
	s, err := b.change(ctx, f, p, rng, "takeover", hurt)
	if err != nil {
		return err
	}
	res.Samples = append(res.Samples, s)
	if !h.Ended() {
		return fmt.Errorf("process %d was taken over and lives", h.PID)
	}
	if err := b.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return err
	}
	s, err = b.change(ctx, f, p, rng, "giveback", func() error {
		_, err := b.pair.Client().Giveback(ctx, guest)
		return err
	})
	if err != nil {
		return err
	}
	if back != nil {
		back.Samples = append(back.Samples, s)
	}
	return nil
}

// change does something that brings another guest to serve the probe, at a
// random moment, and returns what the probe saw of it.
func (b *bench) change(ctx context.Context, f fault, p *probe, rng *rand.Rand, kind string, do func() error) (sample, error) {
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
		if t == nil || t.Kind != kind || t.Of != guest || t.Started.Before(began.Truncate(time.Millisecond)) {
			return fmt.Sprintf("no %s of %s in the status", kind, guest)
		}
		took = *t
		return ""
	})
	if err != nil {
		return sample{}, err
	}
	if took.Error != "" {
		return sample{}, fmt.Errorf("%s of %s: %s", kind, guest, took.Error)
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
