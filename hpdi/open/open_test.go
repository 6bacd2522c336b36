package open

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A file is opened wherever it lies and whatever it is called.
func TestOpenFile(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, os.Mkdir("a b", 0o700))
	for _, name := range []string{"plain", "a b/50%? yes#1", "ümlaut"} {
		must(t, os.WriteFile(name, make([]byte, 1<<20), 0o600))
		abs, err := filepath.Abs(name)
		must(t, err)
		for _, uri := range []string{
			"file:" + url.PathEscape(name), "file:" + (&url.URL{Path: abs}).EscapedPath(), "file://" + (&url.URL{Path: abs}).EscapedPath(), "FILE:" + url.PathEscape(name) + "?direct=off&read-only=on",
		} {
			d, err := Open(t.Context(), uri)
			if err != nil {
				t.Errorf("%s: %v", uri, err)
				continue
			}
			if i := d.Info(); i.Size != 1<<20 || i.ReadOnly != strings.Contains(uri, "read-only") {
				t.Errorf("%s: %+v", uri, i)
			}
			must(t, d.Close())
		}
	}
}

func TestOpenMemory(t *testing.T) {
	d, err := Open(t.Context(), "mem:?size=1MiB")
	must(t, err)
	if i := d.Info(); i.Size != 1<<20 || i.Driver != "mem" {
		t.Errorf("%+v", i)
	}
	must(t, d.Close())
	s, set, err := Settings("mem:")
	must(t, err)
	if s.Name != "mem" || len(set) != 1 || set[0].Name != "size" || set[0].Value != "64MiB" {
		t.Errorf("settings of %s: %+v", s.Name, set)
	}
}

// What cannot be opened is said with what could be.
func TestBadURIs(t *testing.T) {
	for uri, want := range map[string]string{
		"":                            "begin with a scheme: file:PATH, uring:PATH, mem:",
		"/dev/sdb":                    "begin with a scheme",
		"http://host/":                "begin with a scheme",
		"file://host/path":            `it names host "host"; write file:PATH`,
		"mem://x@/":                   "write mem:?size=SIZE",
		"file:/x?direct=sometimes":    `property "direct" (enum:`,
		"file:/x?engine=sync":         `property "engine" is not known here: there are direct`,
		"file:/x?a;b":                 "properties: invalid semicolon",
		"file:/x#1":                   "write a # as %23",
		"file:%zz":                    "invalid URL escape",
		"file:/no/such/file":          "no such file",
		"uring:/no/such/file":         "no such file",
		"mem:?size=1":                 `property "size" (size: Bytes of memory, a multiple of 4KiB): "1" is not a size from 4KiB to 64TiB`,
		"mem:?size=4097":              "not a positive multiple of 4096",
		"nbd://h/x?connections=0":     `property "connections"`,
		"nbd+unix:///x":               "append ?socket=PATH",
		"nbd+unix:///?socket=/no/one": "/no/one",
	} {
		d, err := Open(t.Context(), uri)
		if err == nil {
			t.Errorf("%s is open", uri)
			must(t, d.Close())
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", uri, err)
		} else if strings.Contains(want, "property") && !errors.Is(err, hpdi.ErrProperty) {
			t.Errorf("%s: %v is not %v", uri, err, hpdi.ErrProperty)
		}
	}
	if _, _, err := Settings("file:/x?lock=2"); !errors.Is(err, hpdi.ErrProperty) || !strings.Contains(err.Error(), "file:/x?lock=2") {
		t.Errorf("settings: %v", err)
	}
	if _, _, err := Settings("x"); err == nil {
		t.Error("settings of no scheme")
	}
}

// A property is added where there is none, and the URI knows it.
func TestWith(t *testing.T) {
	for uri, want := range map[string]string{
		"file:/x":                       "file:/x?read-only=on",
		"file:/x?direct=on":             "file:/x?direct=on&read-only=on",
		"file:/x?read-only=off&lock=on": "file:/x?read-only=off&lock=on",
		"mem:":                          "mem:",
		"nbd+unix:///?socket=/a%20b":    "nbd+unix:///?socket=/a%20b&read-only=on",
	} {
		if got, err := With(uri, "read-only", "on"); err != nil || got != want {
			t.Errorf("%s: %s, %v", uri, got, err)
		}
	}
	if _, err := With("disk", "read-only", "on"); err == nil {
		t.Error("something was added to no URI")
	}
}

// A file is created once; what is no file cannot be.
func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	must(t, Create("file:"+path, 1<<20))
	d, err := Open(t.Context(), "file:"+path)
	must(t, err)
	if d.Info().Size != 1<<20 {
		t.Errorf("%+v", d.Info())
	}
	must(t, d.Close())
	if err := Create("uring:"+path, 1<<20); !errors.Is(err, os.ErrExist) {
		t.Errorf("it is there already: %v", err)
	}
	if err := Create("mem:", 1<<20); !errors.Is(err, hpdi.ErrUnsupported) {
		t.Errorf("memory: %v", err)
	}
	if err := Create("x", 1<<20); err == nil {
		t.Error("nothing was created")
	}
}

// Each scheme says what it is, and each of its properties what it takes; the defaults are
// values that it takes.
func TestSchemes(t *testing.T) {
	var names []string
	for _, s := range Schemes() {
		if names = append(names, s.Name); s.Meaning == "" || strings.HasSuffix(s.Meaning, ".") || !strings.HasPrefix(s.Form, s.Name+":") || s.open == nil {
			t.Errorf("scheme %+v", s)
		}
		given := url.Values{}
		for i, p := range s.Properties {
			if p.Name != strings.ToLower(p.Name) || p.Meaning == "" || strings.HasSuffix(p.Meaning, ".") || p.Type == hpdi.TypeEnum != (len(p.Values) > 0) {
				t.Errorf("%s: property %+v", s.Name, p)
			}
			if slices.ContainsFunc(s.Properties[:i], func(q hpdi.Property) bool { return q.Name == p.Name }) {
				t.Errorf("%s: property %s twice", s.Name, p.Name)
			}
			if p.Default != "" {
				given.Set(p.Name, p.Default)
			}
		}
		if _, err := hpdi.ParseSettings(s.Properties, given); err != nil {
			t.Errorf("%s: the defaults: %v", s.Name, err)
		}
	}
	if sorted := slices.Sorted(slices.Values(names)); len(slices.Compact(sorted)) != len(names) {
		t.Errorf("a scheme twice: %v", names)
	}
}

// FuzzSettings: whatever somebody writes is an error, or a scheme with values for all that
// it takes.
func FuzzSettings(f *testing.F) {
	for _, uri := range []string{"file:/dev/sdb?direct=on&lock=yes", "uring:a%20b", "mem:?size=1.5G", "nbd://host:1/x?connections=4&reconnect=1m", "nbd+unix:///?socket=/run/s", "file:x?direct", "mem:#"} {
		f.Add(uri)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		s, set, err := Settings(uri)
		if err != nil {
			return
		}
		given := url.Values{}
		for i, v := range set {
			if v.Name != s.Properties[i].Name {
				t.Fatalf("%q: %s in place of %s", uri, v.Name, s.Properties[i].Name)
			}
			if v.Value != "" || v.Type == hpdi.TypeString {
				given.Set(v.Name, v.Value)
			}
		}
		if len(set) != len(s.Properties) {
			t.Fatalf("%q: %d of %d properties", uri, len(set), len(s.Properties))
		}
		if _, err := hpdi.ParseSettings(s.Properties, given); err != nil {
			t.Fatalf("%q: what was read is not taken again: %v", uri, err)
		}
	})
}
