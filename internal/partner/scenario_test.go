package partner

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the expected output of scenarios")

// TestScenarios plays testdata/*.txt. A scenario is a list of commands, each
// followed by a line of dashes and what it must print; text before the first
// command that begins with # says what it is about. See command for the words.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			got, err := play(want)
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(f, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s: went otherwise than written; if that is right, run with -update and review the difference\n%s", f, firstDifference(string(got), string(want)))
			}
		})
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range g {
		if i >= len(w) || g[i] != w[i] {
			return fmt.Sprintf("line %d\n got: %s\nwant: %s", i+1, g[i], strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""))
		}
	}
	return "the end is missing"
}

// play runs the commands of a scenario and returns it with actual output.
func play(text []byte) ([]byte, error) {
	w := newWorld()
	var out bytes.Buffer
	sc := bufio.NewScanner(bytes.NewReader(text))
	skipping := false
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		switch {
		case skipping && line != "":
			continue
		case skipping:
			skipping = false
			continue
		case line == "":
			continue
		case strings.HasPrefix(line, "#"):
			fmt.Fprintln(&out, line)
			continue
		case line == "----":
			skipping = true
			continue
		}
		w.trace = nil
		shown, err := w.command(strings.Fields(line))
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if w.failed != nil {
			return nil, fmt.Errorf("line %d: %w", n, w.failed)
		}
		fmt.Fprintln(&out, line)
		fmt.Fprintln(&out, "----")
		for _, l := range w.trace {
			fmt.Fprintln(&out, l)
		}
		fmt.Fprintln(&out, shown)
	}
	return out.Bytes(), sc.Err()
}

// command runs one command of a scenario.
func (w *world) command(f []string) (string, error) {
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	p := w.procs[arg(1)]
	switch f[0] {
	case "quiet": // leave messages out of what is printed
		w.quiet = true
		return "", nil
	case "alone": // only guest a exists
		w.rcfg.Guests = []string{"a"}
		return "", nil
	case "manual-giveback":
		w.mcfg.GivebackDelay = -1
		return "", nil
	case "restart-first": // restart-first GUEST...: its restart comes before its takeover
		w.rcfg.RestartFirst = f[1:]
		return "", nil
	case "poison": // whoever serves a dies of it, for as long as deaths are remembered
		w.rcfg.ProvenAfter = 3 * time.Second
		return "", nil
	case "start-agent":
		w.startAgent()
		w.settle()
	case "kill-agent":
		w.killAgent()
		w.settle()
	case "pass": // pass DURATION: time goes by, 20 ms at a time
		d, err := time.ParseDuration(arg(1))
		if err != nil {
			return "", err
		}
		w.pass(d, 20*time.Millisecond)
	case "jump": // jump DURATION: nobody ran in the meantime
		d, err := time.ParseDuration(arg(1))
		if err != nil {
			return "", err
		}
		w.tick(d)
		w.settle()
	case "show":
		return w.show(), nil
	case "takeover", "giveback":
		w.moveByHand(f[0], arg(1))
		w.settle()
	case "restart":
		w.ref.Step(Message{Kind: KindRestart, Guest: arg(1)})
		w.drainRef()
	case "down":
		w.ref.Step(Message{Kind: KindDown})
		w.drainRef()
		w.settle()
	case "break", "mend": // break GUEST IDENTITY: opening fails there
		w.broken[arg(1)+" "+arg(2)] = f[0] == "break"
	case "no-exec", "exec":
		w.noExec[arg(1)] = f[0] == "no-exec"
	case "mute", "unmute": // mute GUEST: what its process says reaches nobody
		w.mute[arg(1)] = f[0] == "mute"
		w.settle()
	case "slow", "fast": // slow GUEST: its jobs stay under way
		w.slow[arg(1)] = f[0] == "slow"
		w.settle()
	default:
		if p == nil {
			return "", fmt.Errorf("unknown command %q", strings.Join(f, " "))
		}
		return "", w.toProcess(f[0], p, arg(2))
	}
	return "", nil
}

// toProcess runs a command that concerns one process.
func (w *world) toProcess(cmd string, p *proc, id string) error {
	switch cmd {
	case "kill":
		w.die(p)
	case "kill-both":
		for _, q := range w.procs {
			w.die(q)
		}
	case "hang":
		p.hung = true
	case "resume":
		p.hung = false
	case "stuck": // a device of the guest stands still; its probe passes
		p.m.Step(Message{Kind: KindStuck, Identity: id, Reason: "a device has not answered for 5s"})
		w.drain(p)
	case "unstuck":
		p.m.Step(Message{Kind: KindStuck, Identity: id})
		w.drain(p)
	case "close", "open": // close GUEST IDENTITY: its pool, and it is served on without
		w.setPool(p, id, cmd == "open")
	case "lose": // the pool ends by itself
		w.stopActing(p, id)
		p.m.Step(Message{Kind: KindLost, Identity: id, Term: p.m.ids[id].term, Reason: "ownership lost to a higher epoch"})
		w.drain(p)
	default:
		return fmt.Errorf("unknown command %q", cmd)
	}
	w.settle()
	return nil
}

// moveByHand is what the agent makes of the two commands.
func (w *world) moveByHand(cmd, g string) {
	to := g
	for _, o := range w.rcfg.Guests {
		if cmd == "takeover" && o != g {
			to = o
		}
	}
	w.ref.Step(Message{Kind: KindMove, Identity: g, To: to, Cmd: 7, Reason: cmd + " by command", Planned: true})
	w.drainRef()
}
