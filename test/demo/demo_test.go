package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/test/image"
	testpair "github.com/pollux-storage/pollux/test/pair"
)

func TestProbeMeasuresThePauseAndNothingElse(t *testing.T) {
	testpair.Need(t, "nbdkit")
	dir := t.TempDir()
	store, socket := filepath.Join(dir, "store"), filepath.Join(dir, "s")
	if err := os.WriteFile(store, make([]byte, probeBlock*probeBlocks), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := newProbe("nbd+unix:///disk?socket=" + socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stop, err := image.ServeFile(ctx, socket, store)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); p.run(ctx) }()
	if err := p.answered(ctx, 100); err != nil {
		t.Fatal(err)
	}
	p.reset()
	begin := time.Now()
	stop()
	_, writes, _ := p.result()
	if stop, err = image.ServeFile(ctx, socket, store); err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := p.answered(ctx, writes+1); err != nil {
		t.Fatal(err)
	}
	upper := time.Since(begin)
	pause, _, err := p.result()
	if err != nil {
		t.Fatal(err)
	}
	if pause.reconnect == 0 || pause.reconnect > upper {
		t.Errorf("pause %v, and the server was away for at most %v", pause.reconnect, upper)
	}
	cancel()
	<-ended
}
