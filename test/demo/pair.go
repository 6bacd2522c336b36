package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/test/image"
)

// pair drives the pollux command as a person would.
type pair struct {
	bin, dir string
}

// status is what the demo reads of `pollux status --json`.
type status struct {
	Protected    bool     `json:"protected"`
	Guests       []guest  `json:"guests"`
	LastTakeover takeover `json:"last_takeover"`
}

type takeover struct {
	Total float64 `json:"total_ms"`
	Steps []struct {
		Name string  `json:"name"`
		Took float64 `json:"took_ms"`
	} `json:"steps"`
}

// String lists the steps that took long enough to matter.
func (t takeover) String() string {
	text := fmt.Sprintf("%.1f ms", t.Total)
	sep := ": "
	for _, s := range t.Steps {
		if s.Took >= 0.5 {
			text += fmt.Sprintf("%s%s %.1f", sep, s.Name, s.Took)
			sep = ", "
		}
	}
	return text
}

type guest struct {
	Name    string   `json:"name"`
	State   string   `json:"state"`
	PID     int      `json:"pid"`
	Exports []export `json:"exports"`
}

type export struct {
	Volume   string `json:"volume"`
	ServedBy string `json:"served_by"`
	NBD      string `json:"nbd"`
	NBDUnix  string `json:"nbd_unix"`
}

// do runs one pollux command.
func (p *pair) do(ctx context.Context, args ...string) ([]byte, error) {
	args = append(args, "--dir", p.dir)
	fmt.Printf("  $ pollux %s\n", strings.Join(args[:len(args)-2], " "))
	return image.Run(ctx, p.bin, args...)
}

func (p *pair) status(ctx context.Context) (status, error) {
	var st status
	out, err := image.Run(ctx, p.bin, "status", "--json", "--dir", p.dir)
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	return st, err
}

// serving finds who serves a volume. Exports are listed with the identity that
// clients know, whoever serves it.
func (p *pair) serving(ctx context.Context, volume string) (guest, export, error) {
	st, err := p.status(ctx)
	if err != nil {
		return guest{}, export{}, err
	}
	for _, identity := range st.Guests {
		for _, e := range identity.Exports {
			for _, g := range st.Guests {
				if e.Volume == volume && e.ServedBy == g.Name {
					return g, e, nil
				}
			}
		}
	}
	return guest{}, export{}, fmt.Errorf("no guest serves volume %s", volume)
}

// until waits for a state of the pair that ok accepts.
func (p *pair) until(ctx context.Context, what string, ok func(status) bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		st, err := p.status(ctx)
		if err == nil && ok(st) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, errors.Join(ctx.Err(), err))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// kill ends the guest that serves a volume with SIGKILL and returns its name.
func (p *pair) kill(ctx context.Context, volume string) (string, error) {
	g, _, err := p.serving(ctx, volume)
	if err != nil {
		return "", err
	}
	if g.PID <= 1 {
		return "", fmt.Errorf("guest %s has no process", g.Name)
	}
	return g.Name, syscall.Kill(g.PID, syscall.SIGKILL)
}

// logs prints what the agent and the guests wrote, for a demo that failed.
func (p *pair) logs() {
	cmd := exec.Command("sh", "-c", `tail -n 30 "$1"/log/*.log`, "sh", p.dir)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.Run() // best effort: the failure itself is reported elsewhere
}
