package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pollux-storage/pollux/internal/control"
)

// TestRealPair runs the scripts in testdata/real with the real program and
// real guests, on ports and in directories of their own.
func TestRealPair(t *testing.T) {
	if testing.Short() {
		t.Skip("starts real guests")
	}
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "pollux"), "../../cmd/pollux")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/real",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("TZ", "UTC")
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Defer(func() {
				// A script that failed leaves a pair that runs.
				for _, dir := range []string{"pollux-data", "some dir"} {
					down := exec.Command(filepath.Join(bin, "pollux"), "down", "--dir", filepath.Join(e.WorkDir, dir))
					if out, err := down.CombinedOutput(); err != nil {
						t.Errorf("taking the pair of the script down: %v\n%s", err, out)
					}
				}
			})
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    exitedWith,
			"uri":       findURI,
			"pids":      findPIDs,
			"same":      same,
			"killagent": killAgent,
			"regionof":  findRegion,
			"flip":      flip,
			"countsof":  findCounts,
		},
	})
}

// findURI puts the unix URI of a volume, as status tells it, into a variable
// of the script: uri VARIABLE VOLUME [FLAGS OF STATUS].
func findURI(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) < 2 {
		ts.Fatalf("usage: uri VARIABLE VOLUME [FLAGS OF STATUS]")
	}
	for _, g := range statusOf(ts, words[2:]...).Guests {
		for _, e := range g.Exports {
			if e.Volume == words[1] {
				ts.Setenv(words[0], e.NBDUnix)
				return
			}
		}
	}
	ts.Fatalf("no export of volume %s", words[1])
}

func statusOf(ts *testscript.TestScript, flags ...string) (st control.Status) {
	ts.Check(ts.Exec("pollux", append([]string{"status", "--json"}, flags...)...))
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &st))
	return st
}

// findRegion puts the file of the first guest's own region into a variable:
// regionof VARIABLE.
func findRegion(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 1 {
		ts.Fatalf("usage: regionof VARIABLE")
	}
	for _, r := range statusOf(ts).Guests[0].Region {
		if r.Mapped == "owner" {
			ts.Setenv(words[0], r.Path)
			return
		}
	}
	ts.Fatalf("the guest has no region")
}

// flip changes a byte of a file: flip FILE OFFSET.
func flip(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	at, err := strconv.ParseInt(words[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(words[0]), os.O_RDWR, 0)
	ts.Check(err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	ts.Check(err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], at)
	ts.Check(err)
	ts.Check(f.Close())
}

// findCounts puts the byte of a pool's first device at which the root of its reference
// counts is, and that of its twin, into variables: countsof VARIABLE TWIN DEVICE.
func findCounts(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 3 {
		ts.Fatalf("usage: countsof VARIABLE TWIN DEVICE")
	}
	ts.Check(ts.Exec("pollux", "dump", "superblock", "--json", words[2]))
	var d struct {
		Slots []struct {
			Wins    bool
			Devices []struct {
				Counts string
				Twin   string `json:"counts_twin"`
			}
		}
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &d))
	for _, s := range d.Slots {
		if !s.Wins {
			continue
		}
		for i, place := range []string{s.Devices[0].Counts, s.Devices[0].Twin} {
			var b int64
			if _, err := fmt.Sscanf(place, "0:%d", &b); err != nil {
				ts.Fatalf("counts at %q: %v", place, err)
			}
			ts.Setenv(words[i], strconv.FormatInt(b*4096, 10))
		}
		return
	}
	ts.Fatalf("no superblock counts: %+v", d)
}

// findPIDs puts the guests' processes into a variable: pids VARIABLE.
func findPIDs(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 1 {
		ts.Fatalf("usage: pids VARIABLE")
	}
	var pids []string
	for _, g := range statusOf(ts).Guests {
		pids = append(pids, strconv.Itoa(g.PID))
	}
	ts.Setenv(words[0], strings.Join(pids, ","))
}

// same compares two words: same A B.
func same(ts *testscript.TestScript, neg bool, words []string) {
	if len(words) != 2 || (words[0] == words[1]) == neg {
		ts.Fatalf("same %q", words)
	}
}

// killAgent kills the agent with SIGKILL and waits for its end.
func killAgent(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 0 {
		ts.Fatalf("usage: killagent")
	}
	st := statusOf(ts)
	if st.Agent.PID <= 1 {
		ts.Fatalf("there is no agent to kill")
	}
	ts.Check(syscall.Kill(st.Agent.PID, syscall.SIGKILL))
	ts.Check(awaitExit(context.Background(), st.Agent.PID))
}
