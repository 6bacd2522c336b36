package cli

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/crash"
)

// unpack returns the files of a bundle.
func unpack(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	z, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(p)
	}
}

// TestBundleIsBounded: of a large file a part is taken, and what does not fit any more is
// named; the list of both always fits.
func TestBundleIsBounded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(name, append(make([]byte, bundleFileLimit), "the end"...), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	b := newBundle(&out, "x", time.Unix(0, 0))
	b.limit = bundleFileLimit + 10
	b.file("log", name, crash.Tail)
	b.file("none", name+"x", crash.Tail)
	b.put("small", []byte("12345"))
	b.put("more", []byte("123456"))
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	files := unpack(t, bytes.NewReader(out.Bytes()))
	if got := files["x/log"]; len(got) != bundleFileLimit || !strings.HasSuffix(got, "the end") {
		t.Errorf("%d bytes of the log", len(got))
	}
	r := b.result("f")
	if len(files) != 3 || files["x/small"] != "12345" || len(r.Missing) != 1 || !strings.Contains(files["x/manifest.json"], "the bundle is full: 8.0 MiB is the most") {
		t.Errorf("%d files, %+v, %s", len(files), r, files["x/manifest.json"])
	}
	if r.Bytes != int64(out.Len()) || len(r.Files) != 3 {
		t.Errorf("%+v of %d bytes", r, out.Len())
	}
}

// full takes some bytes and no more.
type full int

func (f *full) Write(p []byte) (int, error) {
	if *f -= full(len(p)); *f < 0 {
		return 0, errors.New("disk is full")
	}
	return len(p), nil
}

// TestBundleOnFullDisk: wherever the disk is full, that is the error.
func TestBundleOnFullDisk(t *testing.T) {
	for room := range 40 {
		f := full(room * 5)
		b := newBundle(&f, "x", time.Unix(0, 0))
		for i := range 5 {
			b.put(fmt.Sprint(i), []byte("content"))
		}
		if err := b.close(); err == nil || !strings.Contains(err.Error(), "disk is full") {
			t.Fatalf("with room for %d bytes: %v", room*5, err)
		}
	}
}

func TestWithoutSecrets(t *testing.T) {
	v, err := withoutSecrets(json.RawMessage(`{"a": [{"api_token": "sesame", "key": "/k.pem"}], "alerts": {"command": ["x", "sesame", "sesame"]},
		"Password": {"x": "sesame"}, "command": ["only"], "big": 9007199254740993}`))
	if err != nil {
		t.Fatal(err)
	}
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Password":"(removed)","a":[{"api_token":"(removed)","key":"/k.pem"}],"alerts":{"command":["x","(removed)"]},"big":9007199254740993,"command":["only"]}`
	if string(p) != want {
		t.Errorf("%s", p)
	}
	if _, err := withoutSecrets(json.RawMessage("{")); err == nil {
		t.Error("no JSON, no error")
	}
}

// TestHostFacts: devices are shown whatever the kernel tells of them.
func TestHostFacts(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"sda/size": "100\n", "sda/queue/rotational": "1\n", "dm-0/dm/name": "a \"b\"\n", "odd/x": ""} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := blockDevices(dir)
	if want := "dm-0 dm/name=\"a \\\"b\\\"\"\nodd\nsda size=\"100\" queue/rotational=\"1\"\n"; string(got) != want || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := blockDevices(dir + "x"); err == nil {
		t.Error("there is no such folder")
	}
	st := control.Status{Guests: []control.GuestStatus{{Devices: []control.DeviceStatus{
		{Pool: "p", Path: filepath.Join(dir, "sda/size")}, {Pool: "p", Path: dir + "x"}}}}}
	got, err = poolDevices(st)
	if err != nil || !strings.Contains(string(got), "file of 4 bytes") || !strings.Contains(string(got), "no such file") {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := poolDevices(control.Status{}); err == nil {
		t.Error("no pool is open")
	}
}
