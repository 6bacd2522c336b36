package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// target is where an export is.
type target struct {
	network, address string // as net.Dial has them
	host             string // to verify a certificate by
	export           string
	tls              bool
}

// defaultPort is the one that is registered for NBD.
const defaultPort = "10809"

// parse reads a URI as https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md has
// it: nbd://host:port/export, nbds:// with TLS, nbd+unix:///export?socket=PATH, nbds+unix.
func parse(uri string) (target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return target{}, fmt.Errorf("NBD URI %q: %w", uri, err)
	}
	t := target{export: strings.TrimPrefix(u.Path, "/")}
	switch u.Scheme {
	case "nbd", "nbds":
		if u.Query().Has("socket") {
			return target{}, fmt.Errorf("NBD URI %q: a socket goes with nbd+unix or nbds+unix", uri)
		}
		t.network, t.host = "tcp", u.Hostname()
		if t.host == "" {
			t.host = "localhost"
		}
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		t.address = net.JoinHostPort(t.host, port)
	case "nbd+unix", "nbds+unix":
		t.network, t.address = "unix", u.Query().Get("socket")
		if t.address == "" {
			return target{}, fmt.Errorf("NBD URI %q names no socket: append ?socket=PATH", uri)
		}
	default:
		return target{}, fmt.Errorf("NBD URI %q: its scheme must be nbd, nbds, nbd+unix or nbds+unix", uri)
	}
	t.tls = strings.HasPrefix(u.Scheme, "nbds")
	for _, name := range []string{"tls-certificates", "tls-hostname"} {
		if !t.tls && u.Query().Has(name) {
			return target{}, fmt.Errorf("NBD URI %q: %s goes with nbds or nbds+unix", uri, name)
		}
	}
	if len(t.export) > maxName {
		return target{}, fmt.Errorf("NBD URI: an export name of %d bytes, at most %d are possible", len(t.export), maxName)
	}
	return t, nil
}
