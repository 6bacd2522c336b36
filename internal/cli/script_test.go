package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// The scripts in testdata/script run the real command line against a fake
// pair, whose answers are files of the script: `pair DIR` serves a control
// socket in ./pollux-data that answers with DIR/status.json and so on, or with
// DIR/error.json, and writes what it was asked to DIR/requests.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"pollux": func() { os.Exit(run(os.Args[1:], fake)) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("POLLUX_UPDATE_SCRIPTS") != "",
		Setup: func(e *testscript.Env) error {
			e.Setenv("TZ", "UTC")
			// Under the race detector each command would sleep for a second
			// when it ends.
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"pair":   serveFake,
			"orphan": serveOrphan,
			"status": exitedWith,
			"await":  await,
		},
	})
}

// exitedWith runs a command and compares its exit status, which testscript
// itself cannot: status 4 pollux status.
func exitedWith(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) < 2 {
		ts.Fatalf("usage: status N COMMAND...")
	}
	err := ts.Exec(words[1], words[2:]...)
	got := 0
	var exit interface{ ExitCode() int }
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if fmt.Sprint(got) != words[0] {
		ts.Fatalf("exit status %d instead of %s", got, words[0])
	}
}

// await waits until a file exists: await FILE.
func await(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 1 {
		ts.Fatalf("usage: await FILE")
	}
	for range 3000 {
		if _, err := os.Stat(ts.MkAbs(words[0])); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("%s does not appear", words[0])
}

// serveFake starts a fake pair for the rest of the script.
func serveFake(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 1 {
		ts.Fatalf("usage: pair DIR")
	}
	srv, err := listenFake(control.AgentSocket(ts.MkAbs("pollux-data")), ts.MkAbs(words[0]), nil)
	ts.Check(err)
	ts.Defer(func() { ts.Check(srv.Close(context.Background())) })
}

// serveOrphan starts a fake guest whose agent has ended: orphan NAME DIR.
func serveOrphan(ts *testscript.TestScript, neg bool, words []string) {
	if neg || len(words) != 2 {
		ts.Fatalf("usage: orphan NAME DIR")
	}
	dir := ts.MkAbs("pollux-data")
	srv, err := listenFake(control.GuestSocket(dir, words[0]), ts.MkAbs(words[1]), nil)
	ts.Check(err)
	ts.Defer(func() { ts.Check(srv.Close(context.Background())) })
	cfg, err := config.Load(dir, "")
	ts.Check(err)
	ts.Check(cfg.WriteEffective())
}

func listenFake(socket, answers string, down func()) (*control.Server, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, err
	}
	os.Remove(socket)
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	return control.Serve(ln, fakeHandlers(answers, down)), nil
}

// answer reads the answer to one kind of request, and notes the request.
func answer[T any](dir, name, request string) (v T, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "requests"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return v, err
	}
	if _, err := fmt.Fprintln(f, strings.TrimSpace(name+" "+request)); err != nil {
		return v, err
	}
	if err := f.Close(); err != nil {
		return v, err
	}
	var failure control.Error
	if p, err := os.ReadFile(filepath.Join(dir, "error.json")); err == nil {
		if err := json.Unmarshal(p, &failure); err != nil {
			return v, err
		}
		return v, &failure
	}
	p, err := os.ReadFile(filepath.Join(dir, name+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return v, nil
	}
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(p, &v)
}

func fakeHandlers(dir string, down func()) control.Handlers {
	text := func(v any) string {
		p, err := json.Marshal(v)
		if err != nil {
			return err.Error()
		}
		return string(p)
	}
	return control.Handlers{
		Status:  func(context.Context) (control.Status, error) { return answer[control.Status](dir, "status", "") },
		Volumes: func(context.Context) ([]control.Volume, error) { return answer[[]control.Volume](dir, "volumes", "") },
		Volume: func(_ context.Context, n string) (control.Volume, error) {
			return answer[control.Volume](dir, "volume", n)
		},
		CreateVolume: func(_ context.Context, c control.VolumeCreate) (control.Volume, error) {
			return answer[control.Volume](dir, "volume", "create "+text(c))
		},
		ChangeVolume: func(_ context.Context, n string, c control.VolumeChange) (control.Volume, error) {
			return answer[control.Volume](dir, "volume", n+" "+text(c))
		},
		DeleteVolume: func(_ context.Context, n string) error {
			_, err := answer[struct{}](dir, "delete", n)
			return err
		},
		Pools: func(context.Context) ([]control.Pool, error) { return answer[[]control.Pool](dir, "pools", "") },
		Pool:  func(_ context.Context, n string) (control.Pool, error) { return answer[control.Pool](dir, "pool", n) },
		CreatePool: func(_ context.Context, c control.PoolCreate) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", "create "+text(c))
		},
		AddDevice: func(_ context.Context, n string, c control.PoolAdd) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" add "+text(c))
		},
		ExportPool: func(_ context.Context, n string, c control.PoolExport) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" export "+text(c))
		},
		ImportPool: func(_ context.Context, c control.PoolImport) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", "import "+text(c))
		},
		RemoveDevice: func(_ context.Context, n string, c control.PoolRemove) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" remove "+text(c))
		},
		ChangeCopy: func(_ context.Context, n string, c control.CopyChange) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" copy "+text(c))
		},
		ChangePool: func(_ context.Context, n string, c control.PoolChange) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" set "+text(c))
		},
		ScrubPool: func(_ context.Context, n string, c control.ScrubChange) (control.Pool, error) {
			return answer[control.Pool](dir, "pool", n+" scrub "+text(c))
		},
		SurveyPool: func(_ context.Context, n string, c control.SurveyChange) (control.PoolDedup, error) {
			return answer[control.PoolDedup](dir, "survey", n+" survey "+text(c))
		},
		Dedup: func(context.Context) ([]control.PoolDedup, error) {
			return answer[[]control.PoolDedup](dir, "dedup", "")
		},
		Flash: func(_ context.Context, n string) (control.PoolFlash, error) {
			return answer[control.PoolFlash](dir, "flash", n)
		},
		FlashPolicy: func(_ context.Context, n string) (control.FlashPolicy, error) {
			return answer[control.FlashPolicy](dir, "policy", n)
		},
		ChangeFlashPolicy: func(_ context.Context, n string, c control.FlashPolicyChange) (control.FlashPolicy, error) {
			return answer[control.FlashPolicy](dir, "changed", n+" "+text(c))
		},
		ChangeFlashPin: func(_ context.Context, n string, c control.FlashPinChange) (control.PoolFlash, error) {
			return answer[control.PoolFlash](dir, "flash", n+" pin "+text(c))
		},
		EvacuateFlash: func(_ context.Context, n string, e control.FlashEvacuation) (control.PoolFlash, error) {
			return answer[control.PoolFlash](dir, "flash", n+" evacuate "+text(e))
		},
		ExplainFlash: func(_ context.Context, n string, at control.FlashPlace) (control.FlashExplanation, error) {
			return answer[control.FlashExplanation](dir, "explain", n+" "+text(at))
		},
		SimulateFlash: func(_ context.Context, n string, t control.FlashTrial) (control.FlashPrediction, error) {
			return answer[control.FlashPrediction](dir, "simulate", n+" "+text(t))
		},
		CheckTakeover: func(_ context.Context, n string) (control.TakeoverCheck, error) {
			return answer[control.TakeoverCheck](dir, "dryrun", n)
		},
		Takeover: func(_ context.Context, n string) (control.Takeover, error) {
			return answer[control.Takeover](dir, "takeover", n)
		},
		Giveback: func(_ context.Context, n string) (control.Takeover, error) {
			return answer[control.Takeover](dir, "giveback", n)
		},
		Drill: func(_ context.Context, n, d string) error {
			_, err := answer[struct{}](dir, "drill", d+" "+n)
			return err
		},
		CheckUpgrade: func(_ context.Context, r control.UpgradeRequest) (control.UpgradeCheck, error) {
			return answer[control.UpgradeCheck](dir, "upgrade-check", text(r))
		},
		StartUpgrade: func(_ context.Context, r control.UpgradeRequest) (control.Programs, error) {
			return answer[control.Programs](dir, "upgrade-start", text(r))
		},
		Programs: func(context.Context) (control.Programs, error) {
			return answer[control.Programs](dir, "upgrade", "")
		},
		Check: func(context.Context) (control.CheckReport, error) {
			return answer[control.CheckReport](dir, "check", "")
		},
		Events: func(_ context.Context, q control.EventQuery, emit func(control.Event) error) error {
			events, err := answer[[]control.Event](dir, "events", text(q))
			for _, e := range events {
				if err := emit(e); err != nil {
					return err
				}
			}
			return err
		},
		Down: func(context.Context) error {
			_, err := answer[struct{}](dir, "down", "")
			if down != nil {
				down()
			}
			return err
		},
	}
}

// fake is the backend of the scripts: an agent that answers like `pair` with
// the files in DIR/answers, and fails when there are none.
var fake = backend{
	find: func(paths []string, dir string) (f control.Found, err error) {
		for _, path := range paths {
			p, err := os.ReadFile(filepath.Join(path, "found.json"))
			if err == nil {
				err = json.Unmarshal(p, &f)
			}
			if err != nil {
				return f, err
			}
		}
		if f.Pools == nil {
			f.Pools = []control.FoundPool{}
		}
		return f, nil
	},
	agent: func(ctx context.Context, cfg *config.Config, log io.Writer, _ string) error {
		answers := filepath.Join(cfg.Dir, "answers")
		if _, err := os.Stat(answers); err != nil {
			return control.NewError(control.KindRefused, "device /dev/sdx is locked by another process", "stop what uses it")
		}
		fmt.Fprintln(log, "the agent starts")
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		srv, err := listenFake(control.AgentSocket(cfg.Dir), answers, cancel)
		if err != nil {
			return err
		}
		<-ctx.Done()
		return srv.Close(context.Background())
	},
	guest: func(_ context.Context, args []string) error {
		fmt.Println("guest", args)
		return nil
	},
	check: func(_ context.Context, cfg *config.Config, _ func(control.CheckProgress)) (control.CheckReport, error) {
		return answer[control.CheckReport](filepath.Join(cfg.Dir, "answers"), "check", "offline")
	},
	repair: func(_ context.Context, cfg *config.Config, _ func(control.CheckProgress)) (control.CheckReport, error) {
		return answer[control.CheckReport](filepath.Join(cfg.Dir, "answers"), "repair", "offline")
	},
}
