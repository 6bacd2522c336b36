// Package open opens a device by a URI, whatever driver serves it.
//
//	d, err := open.Open(ctx, "file:/var/lib/disk.img?direct=on")
//
// A URI is a scheme, where the device is, and properties behind a question mark. All
// drivers that there are stand in one table, which [Schemes] lists with the properties that
// each takes. Characters that mean something in a URI are written as such: ? as %3F, # as
// %23, % as %25.
//
// A program that needs one driver alone imports that, and has no other one in it.
package open

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/hpdi/nbd"
	"github.com/pollux-storage/pollux/hpdi/ring"
	"github.com/pollux-storage/pollux/hpdi/vhostuser"
)

// Scheme is one kind of device that can be opened.
type Scheme struct {
	Name       string // what stands before the first colon
	Form       string // how a URI looks, for people
	Meaning    string // what it opens, a sentence without its full stop
	Properties []hpdi.Property

	open func(ctx context.Context, at location) (hpdi.Device, error)
}

// location is a URI taken apart.
type location struct {
	uri    string
	path   string     // what stands between scheme and properties, where that is a path
	values url.Values // the properties
}

var schemes = []Scheme{
	{"file", "file:PATH", "A file or block device, by io_uring or system calls, whichever the kernel allows", file.Properties, openFile(file.EngineAuto)},
	{"uring", "uring:PATH", "A file or block device by io_uring, or not at all", file.Properties, openFile(file.EngineURing)},
	{"mem", "mem:?size=SIZE", "Memory of the program itself, forgotten when it is closed", mem.Properties, by(mem.ParseOptions, openMemory)},
	{"vhost-user", "vhost-user:PATH", "The disk that a vhost-user-blk back-end serves at a socket", vhostuser.Properties, by(vhostuser.ParseOptions, openVhost)},
	{"ring", "ring:PATH", "A ring in shared memory, with the back-end that listens at a socket or maps the same file", ring.Properties, by(ring.ParseOptions, openRing)},
	{"nbd", "nbd://HOST:PORT/EXPORT", "An export of an NBD server over TCP", nbd.Properties, by(nbd.ParseOptions, openNBD)},
	{"nbds", "nbds://HOST:PORT/EXPORT", "The same over TLS", nbd.Properties, by(nbd.ParseOptions, openNBD)},
	{"nbd+unix", "nbd+unix:///EXPORT?socket=PATH", "An export of an NBD server on this machine", nbd.Properties, by(nbd.ParseOptions, openNBD)},
	{"nbds+unix", "nbds+unix:///EXPORT?socket=PATH", "The same over TLS", nbd.Properties, by(nbd.ParseOptions, openNBD)},
}

// Schemes lists what Open knows, in the order of documentation.
func Schemes() []Scheme { return slices.Clone(schemes) }

// Open opens the device that a URI names. The context bounds that alone. A property that the
// scheme does not take, or a value that it cannot have, is an error that wraps
// hpdi.ErrProperty and says what there is.
func Open(ctx context.Context, uri string) (hpdi.Device, error) {
	s, at, err := parse(uri)
	if err != nil {
		return nil, err
	}
	return s.open(ctx, at)
}

// Settings returns the scheme of a URI, and its properties with their values, without
// opening anything.
func Settings(uri string) (Scheme, []hpdi.Setting, error) {
	s, at, err := parse(uri)
	if err != nil {
		return Scheme{}, nil, err
	}
	set, err := hpdi.ParseSettings(s.Properties, at.values)
	if err != nil {
		return Scheme{}, nil, fmt.Errorf("%s: %w", uri, err)
	}
	return s, set.List(), nil
}

// parse takes a URI apart. Its properties are as they are written.
func parse(uri string) (Scheme, location, error) {
	name, _, colon := strings.Cut(uri, ":")
	i := slices.IndexFunc(schemes, func(s Scheme) bool { return s.Name == strings.ToLower(name) })
	if !colon || i < 0 {
		forms := make([]string, 0, len(schemes))
		for _, s := range schemes {
			forms = append(forms, s.Form)
		}
		return Scheme{}, location{}, fmt.Errorf("device %q: begin with a scheme: %s", uri, strings.Join(forms, ", "))
	}
	u, err := url.Parse(uri)
	if err != nil {
		return Scheme{}, location{}, fmt.Errorf("device %q: %w", uri, err)
	}
	if strings.Contains(uri, "#") {
		return Scheme{}, location{}, fmt.Errorf("device %q: write a # as %%23", uri)
	}
	at := location{uri: uri, path: u.Path}
	if u.Opaque != "" {
		if at.path, err = url.PathUnescape(u.Opaque); err != nil {
			return Scheme{}, location{}, fmt.Errorf("device %q: %w", uri, err)
		}
	}
	if at.values, err = url.ParseQuery(u.RawQuery); err != nil {
		return Scheme{}, location{}, fmt.Errorf("device %q: properties: %w", uri, err)
	}
	if !strings.HasPrefix(schemes[i].Name, "nbd") && (u.Host != "" || u.User != nil) {
		return Scheme{}, location{}, fmt.Errorf("device %q: it names host %q; write %s", uri, u.Host, schemes[i].Form)
	}
	return schemes[i], at, nil
}

// by opens with options that a driver makes of the properties.
func by[O any](parse func(url.Values) (O, error), open func(ctx context.Context, at location, o O) (hpdi.Device, error)) func(context.Context, location) (hpdi.Device, error) {
	return func(ctx context.Context, at location) (hpdi.Device, error) {
		o, err := parse(at.values)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at.uri, err)
		}
		return open(ctx, at, o)
	}
}

func openFile(engine file.Engine) func(context.Context, location) (hpdi.Device, error) {
	return by(file.ParseOptions, func(_ context.Context, at location, o file.Options) (hpdi.Device, error) {
		o.Engine = engine
		return file.Open(at.path, o)
	})
}

func openMemory(_ context.Context, at location, o mem.Options) (hpdi.Device, error) {
	return mem.Open(at.path, o)
}

func openVhost(ctx context.Context, at location, o vhostuser.Options) (hpdi.Device, error) {
	return vhostuser.Open(ctx, at.path, o)
}

func openRing(ctx context.Context, at location, o ring.Options) (hpdi.Device, error) {
	return ring.Open(ctx, at.path, o)
}

func openNBD(ctx context.Context, at location, o nbd.Options) (hpdi.Device, error) {
	return nbd.Open(ctx, at.uri, o)
}

// With returns a URI with a property that it does not give yet. It is the same URI if it
// gives the property, or if its scheme knows none of that name.
func With(uri, name, value string) (string, error) {
	s, at, err := parse(uri)
	if err != nil {
		return "", err
	}
	known := slices.ContainsFunc(s.Properties, func(p hpdi.Property) bool { return p.Name == name })
	if !known || at.values.Has(name) {
		return uri, nil
	}
	if strings.Contains(uri, "?") {
		return uri + "&" + url.QueryEscape(name) + "=" + url.QueryEscape(value), nil
	}
	return uri + "?" + url.QueryEscape(name) + "=" + url.QueryEscape(value), nil
}

// Create makes the file that a URI names, of size bytes, all of it a hole. There must be
// none yet. What is no file cannot be created.
func Create(uri string, size int64) error {
	s, at, err := parse(uri)
	if err != nil {
		return err
	}
	if s.Name != "file" && s.Name != "uring" {
		return fmt.Errorf("create %s: only files can be created: %w", uri, hpdi.ErrUnsupported)
	}
	return file.Create(at.path, size)
}
