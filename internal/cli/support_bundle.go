package cli

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/crash"
	"github.com/pollux-storage/pollux/internal/metrics"
)

// Limits of a support bundle.
const (
	bundleFileLimit = 8 << 20   // bytes of one file: of a log its end, of a crash report its beginning
	bundleLimit     = 256 << 20 // bytes of all, before compression
	bundleAskLimit  = 10 * time.Second
)

type supportBundleOptions struct {
	*session
	output string
}

func newSupportBundle(s *session) *cobra.Command {
	o := &supportBundleOptions{session: s}
	c := &cobra.Command{
		Use: "support-bundle", GroupID: groupPair,
		Short: "Collect what explains a failure in one file",
		Long: `Collect in one .tar.gz what somebody needs who is to explain a failure: status,
events, settings, logs, reports of guests that failed, metrics, pools, volumes,
versions, and facts of the host: kernel, memory, devices.

It holds no data of volumes, no keys and no contents of other files that settings
name. Of alerts.command it holds the program and not its arguments. Logs, names
of volumes and addresses are as they are: look before you pass it on.

It works whatever runs. What could not be had is said, also in the bundle, and is
no failure.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	c.Flags().StringVarP(&o.output, "output", "o", "", "file to write, which must not exist; - for standard output (default pollux-support-TIME.tar.gz)")
	s.jsonFlag(c)
	return c
}

func (o *supportBundleOptions) run(ctx context.Context) error {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return fmt.Errorf("directory %q: %w", o.dir, err)
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return control.NewError(control.KindNotFound, "there is no directory "+o.dir, "name the directory of the pair with --dir")
	}
	now := o.now().UTC()
	name := "pollux-support-" + now.Format("20060102T150405Z")
	if o.output == "" {
		o.output = name + ".tar.gz"
	}
	if o.output == "-" {
		if o.json {
			return usagef("--json and --output - both want standard output")
		}
		b := newBundle(o.out, name, now)
		if err := errors.Join(o.collect(ctx, b, dir), b.close()); err != nil {
			return fmt.Errorf("support bundle: %w", err)
		}
		return b.summary(o.err, "standard output")
	}
	f, err := os.OpenFile(o.output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return control.NewError(control.KindExists, o.output+" exists", "name another file with --output")
	}
	if err != nil {
		return fmt.Errorf("support bundle: %w", err)
	}
	b := newBundle(f, name, now)
	err = errors.Join(o.collect(ctx, b, dir), b.close(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("support bundle: %w", err), os.Remove(o.output))
	}
	if o.json {
		return o.printJSON(b.result(o.output))
	}
	return b.summary(o.out, o.output)
}

// collect fills a bundle, what matters most first. Its error is that the bundle cannot be
// written, or that ctx has ended.
func (o *supportBundleOptions) collect(ctx context.Context, b *bundle, dir string) error {
	client := control.NewClient(dir)
	defer client.Close()
	b.json("version.json", func() (any, error) { return buildVersion(), nil })
	var st control.Status
	ask(ctx, b, "status.json", func(ctx context.Context) (any, error) {
		var err error
		st, err = client.Status(ctx)
		return whole(st), err
	})
	if len(st.Guests) > 0 {
		b.gather("status.txt", o.shows(func(s *session) error { return s.printStatus(st) }))
		b.gather("metrics.txt", func() ([]byte, error) { return metrics.Text(st) })
	} else {
		b.missed("metrics.txt", errors.New("there is no status that they could be made of"))
	}
	o.settings(b, dir)
	for _, n := range []string{"events.log", "events.log.1"} {
		b.file(n, filepath.Join(dir, n), crash.Tail)
	}
	reports, err := crash.List((&config.Config{Dir: dir}).CrashDir())
	if err != nil {
		b.missed("crash", err)
	}
	slices.Reverse(reports) // the newest of a guest first
	words, err := filepath.Glob(filepath.Join((&config.Config{Dir: dir}).RunDir(), "guest-*.died-*"))
	if err != nil {
		b.missed("last words", err)
	}
	reports = append(reports, words...) // of guests that hang, or whose agent has ended
	for _, p := range reports {
		b.file(path.Join("crash", filepath.Base(p)), p, head)
	}
	o.pools(ctx, b, client)
	logs, err := os.ReadDir((&config.Config{Dir: dir}).LogDir())
	if err != nil {
		b.missed("log", err)
	}
	for _, e := range logs {
		if e.Type().IsRegular() {
			b.file(path.Join("log", e.Name()), filepath.Join(dir, "log", e.Name()), crash.Tail)
		}
	}
	b.gather("files.txt", func() ([]byte, error) { return listing(dir) })
	hostFacts(b, st)
	return errors.Join(b.err, ctx.Err())
}

// pools adds what is known of pools and volumes.
func (o *supportBundleOptions) pools(ctx context.Context, b *bundle, client *control.Client) {
	var list []control.Pool
	ask(ctx, b, "pools.json", func(ctx context.Context) (any, error) {
		var err error
		list, err = client.Pools(ctx)
		return orEmpty(list), err
	})
	for _, p := range list {
		var one control.Pool
		got := ask(ctx, b, path.Join("pools", safeName(p.Name)+".json"), func(ctx context.Context) (any, error) {
			var err error
			one, err = client.Pool(ctx, p.Name)
			return one, err
		})
		if got {
			b.gather(path.Join("pools", safeName(p.Name)+".txt"), o.shows(func(s *session) error { return s.printPool(one) }))
		}
		if slices.ContainsFunc(one.Devices, func(d control.DeviceStatus) bool { return d.Class == control.ClassFlash }) {
			ask(ctx, b, path.Join("pools", safeName(p.Name)+".flash.json"), func(ctx context.Context) (any, error) { return client.Flash(ctx, p.Name) })
			ask(ctx, b, path.Join("pools", safeName(p.Name)+".flash-policy.json"), func(ctx context.Context) (any, error) { return client.FlashPolicy(ctx, p.Name) })
		}
	}
	ask(ctx, b, "volumes.json", func(ctx context.Context) (any, error) {
		v, err := client.Volumes(ctx)
		return orEmpty(v), err
	})
	ask(ctx, b, "dedup.json", func(ctx context.Context) (any, error) {
		d, err := client.Dedup(ctx)
		return orEmpty(d), err
	})
}

// safeName is the name of a pool as that of a file.
func safeName(name string) string {
	return strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '_'
		}
		return r
	}, name)
}

// shows returns what a command prints for people.
func (o *supportBundleOptions) shows(print func(*session) error) func() ([]byte, error) {
	return func() ([]byte, error) {
		var out bytes.Buffer
		s := *o.session
		s.out, s.json = &out, false
		err := print(&s)
		return out.Bytes(), err
	}
}

// settings adds what the pair is set to: by its files now, and by those it was started with.
func (o *supportBundleOptions) settings(b *bundle, dir string) {
	b.json("settings.json", func() (any, error) {
		c, err := config.Load(dir, "")
		if err != nil {
			// Its further lines may show a piece of the file.
			first, _, _ := strings.Cut(err.Error(), "\n")
			return nil, errors.New(first)
		}
		return withoutSecrets(c)
	})
	for _, n := range []string{config.EffectivePath(dir), filepath.Join(dir, "state.json"), filepath.Join(dir, "bin", "builds.json")} {
		p, err := head(n, bundleFileLimit)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the pair does not run, or has nothing to remember
		}
		b.json(filepath.Base(n), func() (any, error) {
			if err != nil {
				return nil, err
			}
			return withoutSecrets(json.RawMessage(p))
		})
	}
}

// removed stands for what a bundle does not show.
const removed = "(removed)"

// withoutSecrets returns a value as JSON has it, without what may be secret: arguments of
// the program that is told of alerts, and whatever is called like a secret.
func withoutSecrets(v any) (any, error) {
	p, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var out any
	dec := json.NewDecoder(bytes.NewReader(p))
	dec.UseNumber()
	if err := dec.Decode(&out); err != nil {
		return nil, err
	}
	return hide(out), nil
}

func hide(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = hide(v[i])
		}
	case map[string]any:
		for k, x := range v {
			list, isList := x.([]any)
			switch name := strings.ToLower(k); {
			case strings.Contains(name, "secret"), strings.Contains(name, "password"), strings.Contains(name, "token"):
				v[k] = removed
			case name == "command" && isList && len(list) > 1:
				v[k] = []any{list[0], removed}
			default:
				v[k] = hide(x)
			}
		}
	}
	return v
}

// listing shows the files of a pair with their sizes and modes.
func listing(dir string) ([]byte, error) {
	var out bytes.Buffer
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			fmt.Fprintf(&out, "%s: %v\n", p, err)
			return nil
		}
		if st, err := d.Info(); err == nil {
			rel, _ := filepath.Rel(dir, p) // p is below dir
			fmt.Fprintf(&out, "%s %12d %s %s\n", st.Mode(), st.Size(), st.ModTime().UTC().Format(time.RFC3339), rel)
		}
		if out.Len() > bundleFileLimit {
			return fs.SkipAll
		}
		return nil
	})
	return out.Bytes(), err
}

// head returns the first bytes of a file, at most limit of them.
func head(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// bundle is a support bundle that is being written. After an error of what it is written
// to it takes nothing more.
type bundle struct {
	zip   *gzip.Writer
	tar   *tar.Writer
	sent  counter
	name  string // of the folder in it
	now   time.Time
	limit int64 // of bytes
	bytes int64 // of its files
	files []bundleFile
	lacks []bundleLack
	err   error
}

type bundleFile struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"`
}

// bundleLack is what could not be had, and why.
type bundleLack struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

type bundleResult struct {
	File    string       `json:"file"`
	Bytes   int64        `json:"bytes"` // of the file
	Files   []bundleFile `json:"files"`
	Missing []bundleLack `json:"missing"`
}

// counter counts what is written through it.
type counter struct {
	io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n += int64(n)
	return n, err
}

func newBundle(w io.Writer, name string, now time.Time) *bundle {
	b := &bundle{sent: counter{Writer: w}, name: name, now: now, limit: bundleLimit}
	b.zip = gzip.NewWriter(&b.sent)
	b.tar = tar.NewWriter(b.zip)
	return b
}

// missed notes what could not be had.
func (b *bundle) missed(name string, why error) {
	b.lacks = append(b.lacks, bundleLack{name, why.Error()})
}

// put adds a file.
func (b *bundle) put(name string, p []byte) {
	if b.err != nil {
		return
	}
	if int64(len(p)) > b.limit-b.bytes {
		b.missed(name, fmt.Errorf("the bundle is full: %s is the most", humanSize(b.limit)))
		return
	}
	b.err = b.tar.WriteHeader(&tar.Header{Name: path.Join(b.name, name), Mode: 0o600, Size: int64(len(p)), ModTime: b.now, Typeflag: tar.TypeReg})
	if b.err == nil {
		_, b.err = b.tar.Write(p)
	}
	b.bytes += int64(len(p))
	b.files = append(b.files, bundleFile{name, int64(len(p))})
}

// gather adds what get returns, or notes why it does not.
func (b *bundle) gather(name string, get func() ([]byte, error)) bool {
	p, err := get()
	if err != nil {
		b.missed(name, err)
		return false
	}
	b.put(name, p)
	return true
}

// json adds a value.
func (b *bundle) json(name string, get func() (any, error)) bool {
	return b.gather(name, func() ([]byte, error) {
		v, err := get()
		if err != nil {
			return nil, err
		}
		p, err := json.MarshalIndent(v, "", "  ")
		return append(p, '\n'), err
	})
}

// ask adds an answer of the pair, which is waited for only so long.
func ask(ctx context.Context, b *bundle, name string, get func(context.Context) (any, error)) bool {
	return b.json(name, func() (any, error) {
		ctx, cancel := context.WithTimeout(ctx, bundleAskLimit)
		defer cancel()
		return get(ctx)
	})
}

// file adds a part of a file, unless there is no such file.
func (b *bundle) file(name, from string, read func(string, int64) ([]byte, error)) {
	p, err := read(from, bundleFileLimit)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		b.missed(name, err)
	default:
		b.put(name, p)
	}
}

// close ends the bundle with a list of what it has and what it lacks.
func (b *bundle) close() error {
	b.limit += bundleFileLimit // there is always room for it
	b.json("manifest.json", func() (any, error) {
		return struct {
			Made    time.Time    `json:"made"`
			Files   []bundleFile `json:"files"`
			Missing []bundleLack `json:"missing"`
		}{b.now, b.files, orEmpty(b.lacks)}, nil
	})
	if b.err != nil {
		return b.err
	}
	return errors.Join(b.tar.Close(), b.zip.Close())
}

func (b *bundle) result(file string) bundleResult {
	return bundleResult{File: file, Bytes: b.sent.n, Files: b.files, Missing: orEmpty(b.lacks)}
}

// summary tells a person what is in the bundle and what is not.
func (b *bundle) summary(w io.Writer, file string) error {
	_, err := fmt.Fprintf(w, "%s: %d files, %s\n", file, len(b.files), humanSize(b.sent.n))
	if err != nil || len(b.lacks) == 0 {
		return err
	}
	if _, err := fmt.Fprintln(w, "not in it:"); err != nil {
		return err
	}
	for _, l := range b.lacks {
		if _, err := fmt.Fprintf(w, "  %s: %s\n", l.Name, l.Why); err != nil {
			return err
		}
	}
	return nil
}
