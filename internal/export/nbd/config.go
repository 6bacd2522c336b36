package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// Export is a volume as it is offered to clients.
type Export struct {
	Name        string
	Description string // for people; may be empty
	Volume      block.Volume
	ReadOnly    bool           // also true when the volume says so
	RequireTLS  bool           // refuse this export to connections without TLS
	Allow       []netip.Prefix // TCP clients from elsewhere are refused; empty allows all
}

// readOnly reports whether clients may not write.
func (e *Export) readOnly() bool { return e.ReadOnly || e.Volume.Info().ReadOnly }

// allows reports whether a client at addr may use the export. Clients of a
// Unix socket have no address: the permissions of the socket decide.
func (e *Export) allows(addr netip.Addr) bool {
	if len(e.Allow) == 0 || !addr.IsValid() {
		return true
	}
	for _, p := range e.Allow {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// Exports is where the server learns what it offers. It is asked anew for each
// negotiation, so that a resized, renamed or deleted volume is seen by the next
// connection.
type Exports interface {
	// Lookup returns the export of that name, or block.ErrNotFound.
	Lookup(name string) (Export, error)
	// List returns all exports in the order clients shall see.
	List() []Export
}

// TLSMode says whether connections are encrypted.
type TLSMode int

// The modes of the protocol document: NOTLS, SELECTIVETLS and FORCEDTLS.
const (
	TLSOff TLSMode = iota
	TLSAllowed
	TLSRequired
)

// String returns the word that settings use.
func (m TLSMode) String() string {
	switch m {
	case TLSOff:
		return "off"
	case TLSAllowed:
		return "allowed"
	case TLSRequired:
		return "required"
	}
	return fmt.Sprintf("TLSMode(%d)", int(m))
}

// ParseTLSMode is the reverse of String.
func ParseTLSMode(s string) (TLSMode, error) {
	for _, m := range []TLSMode{TLSOff, TLSAllowed, TLSRequired} {
		if s == m.String() {
			return m, nil
		}
	}
	return TLSOff, fmt.Errorf("TLS mode %q: use off, allowed or required: %w", s, block.ErrInvalid)
}

// TLS is the encryption of connections.
type TLS struct {
	Mode   TLSMode
	Config *tls.Config // needed unless Mode is TLSOff; see NewTLSConfig
	// FreeUnix lets clients of Unix sockets choose even under TLSRequired:
	// they had to pass the permissions of the socket.
	FreeUnix bool
}

// NewTLSConfig makes the server's side of TLS from PEM blocks: its certificate
// chain and key and, if clients must show a certificate, the authorities that
// may have signed it (nil: clients stay anonymous).
func NewTLSConfig(cert, key, clientCA []byte) (*tls.Config, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("server certificate and key: %w", err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	if clientCA != nil {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(clientCA) {
			return nil, fmt.Errorf("certificate authorities of clients: no certificate in PEM form found: %w", block.ErrInvalid)
		}
		cfg.ClientCAs, cfg.ClientAuth = pool, tls.RequireAndVerifyClientCert
	}
	return cfg, nil
}

// Limits bound what clients can ask for. A zero field means its default.
type Limits struct {
	Connections int           // at once, over all listeners; 256
	Handshake   time.Duration // from accept to the first command; 10 s
	Options     int           // in one negotiation; 64
	OptionBytes int           // data of one option; 16 KiB
	MetaQueries int           // in one metadata option; 32
	Requests    int           // in flight a connection, which is also its number of workers; 128
	Bytes       int64         // in flight a connection; 64 MiB
	StagedBytes int64         // staged for unfinished payloads, over all connections; 64 MiB
	Payload     time.Duration // from the first byte of a request to its last; 30 s
	Reply       time.Duration // for a client to take the next piece of its replies; 30 s
	Extents     int           // in one block status reply; 4096
}

// What settings can be at most, by the code and by the protocol; and how much
// data of a too long option is skipped in order to answer it.
const (
	maxOptionBytes = inBytes / 2
	maxExtents     = 1 << 20
	maxSkipBytes   = 1 << 20
)

func orDefault[T int | int64 | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// withDefaults returns the limits with each zero field set.
func (l Limits) withDefaults() Limits {
	orDefault(&l.Connections, 256)
	orDefault(&l.Handshake, 10*time.Second)
	orDefault(&l.Options, 64)
	orDefault(&l.OptionBytes, 16<<10)
	orDefault(&l.MetaQueries, 32)
	orDefault(&l.Requests, 128)
	orDefault(&l.Bytes, 64<<20)
	orDefault(&l.StagedBytes, 64<<20)
	orDefault(&l.Payload, 30*time.Second)
	orDefault(&l.Reply, 30*time.Second)
	orDefault(&l.Extents, 4096)
	return l
}

// Config is what a server is made from.
type Config struct {
	Exports Exports
	// Default names the export of clients that ask for none. When it is empty
	// and there is exactly one export, they get that one.
	Default string
	TLS     TLS
	Limits  Limits
	Logger  *slog.Logger // nil: no log
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	if c.Exports == nil {
		return fmt.Errorf("nbd: Config.Exports is nil: %w", block.ErrInvalid)
	}
	if c.TLS.Mode < TLSOff || c.TLS.Mode > TLSRequired {
		return fmt.Errorf("nbd: unknown %v: %w", c.TLS.Mode, block.ErrInvalid)
	}
	if c.TLS.Mode != TLSOff && c.TLS.Config == nil {
		return fmt.Errorf("nbd: TLS is %v and there is no certificate: %w", c.TLS.Mode, block.ErrInvalid)
	}
	l := c.Limits.withDefaults()
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("nbd: limit %s: %w", what, block.ErrInvalid))
		}
	}
	check(l.Connections > 0, "Connections must be positive")
	check(l.Handshake > 0 && l.Payload > 0 && l.Reply > 0, "Handshake, Payload and Reply must be positive times")
	check(l.Options >= 8, "Options must be at least 8, as many as common clients send")
	check(l.OptionBytes >= nbdproto.MaxStringBytes+64 && l.OptionBytes <= maxOptionBytes, "OptionBytes must be from 4160 to 65536")
	check(l.MetaQueries > 0, "MetaQueries must be positive")
	check(l.Requests > 0 && l.Requests <= 4096, "Requests must be from 1 to 4096")
	check(l.Bytes > 0 && l.StagedBytes >= 0, "Bytes must be positive, StagedBytes not negative")
	check(l.Extents > 0 && l.Extents <= maxExtents, "Extents must be from 1 to 1048576")
	return errors.Join(errs...)
}
