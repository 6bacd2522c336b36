package e2e

import (
	"fmt"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// A guest that is killed again and again under a client that connects again is started
// again each time, and its partner never takes over. The client sees no error, and
// everything that it wrote.
func TestRestartFirst(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.Policies = map[string]string{"a": config.RestartFirst}
	s.Failover = append(s.Failover[:len(s.Failover):len(s.Failover)], "restart_limit: 20s", "crash_window: 1ms")
	r := start(t, s)
	const size = 16 << 20
	disk := r.volume("disk", size, "a")
	u, err := url.Parse(disk.NBDUnix)
	if err != nil {
		t.Fatal(err)
	}
	image := fmt.Sprintf("driver=nbd,server.type=unix,server.path=%s,export=disk,reconnect-delay=30,open-timeout=30", u.Query().Get("socket"))
	rng := random(t)
	model := make([]byte, size)
	kills := 0
	const clients, most = 4, 6 // kills under each
	for n := range clients {
		var commands []string
		for range 400 {
			commands = append(commands, draw(rng, model)...)
		}
		cmd := exec.CommandContext(t.Context(), "qemu-io", "--image-opts", image)
		cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
		var said strings.Builder
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		running := true
		for running {
			select {
			case err := <-ended:
				if running = false; err != nil || strings.Contains(said.String(), "failed") {
					t.Fatalf("qemu-io after %d kills: %v\n%.4000s", kills, err, said.String())
				}
			case <-time.After(time.Duration(rng.IntN(60)) * time.Millisecond):
				if kills >= (n+1)*most {
					continue
				}
				p, err := r.HoldGuest(t.Context(), "a")
				if err != nil {
					t.Fatal(err)
				}
				if err := p.Signal(unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				p.Close()
				kills++
				r.until(func(st control.Status) string {
					if n := pair.Guest(st, "a").Resumed; n != kills {
						return fmt.Sprintf("killed %d times, started again %d times", kills, n)
					}
					return ""
				})
			}
		}
		sameContent(t, disk.NBD, model)
	}
	if kills < clients {
		t.Errorf("only %d kills", kills)
	}
	t.Logf("%d kills", kills)
	r.well()
	st := r.status()
	if g := pair.Guest(st, "a"); g.ServedBy != "a" || g.ResumedLate != 0 || g.Policy != config.RestartFirst {
		t.Errorf("%+v", g)
	}
	if k := st.LastTakeover; k == nil || k.Kind != control.KindResumed {
		t.Errorf("last takeover %+v", k)
	}
	r.clean()
}
