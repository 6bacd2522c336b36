package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/bench/counting"
)

// wantedWritten is how many bytes may reach the device for each byte of new data.
const wantedWritten = 1.05

// written is what reached the device for so many bytes of new data.
type written struct {
	Shares  bool            `json:"shares"`
	Flush   bool            `json:"flush"` // once at the end, as a client does that copies
	Bytes   int64           `json:"bytes"`
	Written counting.Counts `json:"written"`
}

func (w *written) all() int64 {
	return w.Written.Data + w.Written.Pages + w.Written.Journal + w.Written.Log
}

// part returns how much of a byte was written for each byte of data.
func (w *written) part(n int64) float64 { return float64(n) / float64(w.Bytes) }

// measureWrites writes new data in sequence to pools that share and do not, until a
// consistency point and a fold have all of it.
func measureWrites(ctx context.Context, o options, r *report) (missed bool, err error) {
	r.Write = nil
	for _, w := range []written{{}, {Shares: true}, {Shares: true, Flush: true}} {
		w.Bytes = int64(o.written)
		if err := w.measure(ctx, o); err != nil {
			return false, err
		}
		r.Write = append(r.Write, w)
	}
	off, on := &r.Write[0], &r.Write[1]
	fmt.Printf("\n## Bytes written for each byte of new data, %s in sequence\n\n", size(off.Bytes))
	fmt.Printf("| | data | pages | journal | flush log | all | of it fingerprints |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for i := range r.Write {
		w, name, prints := &r.Write[i], "without deduplication", "–"
		if w.Shares {
			name = "with"
			// Nothing else differs.
			prints = fmt.Sprintf("%.4f", w.part(w.Written.Pages+w.Written.Journal-off.Written.Pages-off.Written.Journal))
		}
		if w.Flush {
			name += ", and a FLUSH"
		}
		fmt.Printf("| %s | %.4f | %.4f | %.4f | %.4f | %.4f | %s |\n", name, w.part(w.Written.Data), w.part(w.Written.Pages),
			w.part(w.Written.Journal), w.part(w.Written.Log), w.part(w.all()), prints)
	}
	fmt.Println()
	return say(on.part(on.all()) <= wantedWritten, "%.3f bytes are written for each byte of new data (%.2f)", on.part(on.all()), wantedWritten), nil
}

func (w *written) measure(ctx context.Context, o options) (err error) {
	p, err := counting.NewPool(ctx, counting.Options{Size: w.Bytes*5/4 + 2<<30, Log: int64(o.log), Cache: int64(o.cache)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	v, err := create(ctx, p, "v", w.Bytes, w.Shares)
	if err != nil {
		return err
	}
	// What was done to make the pool is not for these data.
	if err := p.Fold(ctx); err != nil {
		return err
	}
	before := p.Device.Count()
	if err := fill(ctx, v, w.Bytes, 1); err != nil {
		return err
	}
	if w.Flush {
		if err := v.Flush(ctx); err != nil {
			return err
		}
	}
	if err := p.Fold(ctx); err != nil {
		return err
	}
	w.Written = p.Device.Count().Minus(before)
	if w.Written.Data != w.Bytes {
		return fmt.Errorf("%d bytes of new data were written for %d: some was taken for stored already", w.Written.Data, w.Bytes)
	}
	return nil
}
