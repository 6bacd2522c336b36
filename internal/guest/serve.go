package guest

import (
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/export/nbd"
)

// exports offers the volumes of a tenancy.
type exports struct {
	t   *tenancy
	cfg *config.Config
}

// Lookup returns the export of a volume.
func (e exports) Lookup(name string) (nbd.Export, error) {
	s := e.t.open()
	if s == nil {
		err := block.ErrNotFound
		if e.t.isGone() {
			// The client has to connect again, to whoever has it now.
			err = block.ErrClosed
		}
		return nbd.Export{}, fmt.Errorf("volume %q: %w", name, err)
	}
	v, err := s.Volume(name)
	if err != nil {
		return nbd.Export{}, err
	}
	set := e.cfg.Exports[name]
	allow := set.Allow
	if len(allow) == 0 {
		allow = e.cfg.NBD.Allow
	}
	x := nbd.Export{Name: name, Volume: v, ReadOnly: set.ReadOnly}
	for _, a := range allow {
		p, err := config.ParsePrefix(a)
		if err != nil {
			return nbd.Export{}, fmt.Errorf("allow-list of %q: %w", name, err)
		}
		x.Allow = append(x.Allow, p)
	}
	return x, nil
}

// List returns all exports.
func (e exports) List() []nbd.Export {
	s := e.t.open()
	if s == nil {
		return nil
	}
	var out []nbd.Export
	for _, v := range s.Volumes() {
		if x, err := e.Lookup(v.Name); err == nil { // else deleted meanwhile
			out = append(out, x)
		}
	}
	return out
}

// open returns the store while the tenancy lasts.
func (t *tenancy) open() Store {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone {
		return nil
	}
	return t.store
}

// isGone reports whether the identity was given up.
func (t *tenancy) isGone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gone
}

func (g *Guest) newServer(t *tenancy) (*nbd.Server, error) {
	c := g.cfg.NBD
	mode, err := nbd.ParseTLSMode(c.TLS)
	if err != nil {
		return nil, err
	}
	cfg := nbd.Config{Exports: exports{t, g.cfg}, Limits: nbd.Limits{
		Connections: c.MaxConnections,
		// Payloads that do not arrive hold at most a quarter of the log.
		StagedBytes: min(64<<20, int64(g.cfg.Log)/4),
	}, Logger: g.log}
	if mode != nbd.TLSOff {
		if cfg.TLS, err = readTLS(mode, c); err != nil {
			return nil, err
		}
	}
	return nbd.New(cfg)
}

func readTLS(mode nbd.TLSMode, c config.NBD) (nbd.TLS, error) {
	var pem [3][]byte
	for i, f := range []string{c.Cert, c.Key, c.CA} {
		if f == "" {
			continue
		}
		p, err := os.ReadFile(f)
		if err != nil {
			return nbd.TLS{}, fmt.Errorf("TLS: %w", err)
		}
		pem[i] = p
	}
	t, err := nbd.NewTLSConfig(pem[0], pem[1], pem[2])
	return nbd.TLS{Mode: mode, Config: t}, err
}

// URIs returns how clients name a volume of an identity.
func URIs(g *config.Guest, volume string) (tcp, unix string) {
	host := g.Endpoint()
	if a, err := netip.ParseAddr(g.Address); err == nil && a.IsUnspecified() {
		host = fmt.Sprintf("localhost:%d", *g.Port)
	}
	u := url.URL{Scheme: "nbd", Host: host, Path: "/" + volume}
	return u.String(), "nbd+unix://" + u.EscapedPath() + "?socket=" + escapeSocket(g.Socket)
}

// escapeSocket escapes what would end the query; slashes stay readable. A
// space is %20: NBD clients do not take a plus for one.
func escapeSocket(path string) string {
	return strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
}
