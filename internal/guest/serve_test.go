package guest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/nbd"
	"github.com/pollux-storage/pollux/internal/partner"
)

func connectTo(t *testing.T, socket string) (net.Conn, error) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, c.SetDeadline(time.Now().Add(30 * time.Second))
}

// readRequest asks for the first block: magic, flags, command, cookie and offset
// that are 0, length.
var readRequest = binary.BigEndian.AppendUint32(append(binary.BigEndian.AppendUint32(nil, 0x25609513), make([]byte, 20)...), 4096)

// attach is a client of a volume, after its handshake.
func (b *bench) attach(volume string) net.Conn {
	b.t.Helper()
	c, err := connectTo(b.t, b.cfg.Guest("a").Socket)
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 18)) // greeting
	}
	opt := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	opt = append(opt, "IHAVEOPT"...)
	opt = binary.BigEndian.AppendUint32(opt, 7) // go
	opt = binary.BigEndian.AppendUint32(opt, uint32(len(volume)+6))
	opt = binary.BigEndian.AppendUint32(opt, uint32(len(volume)))
	opt = append(append(opt, volume...), 0, 0)
	if err == nil {
		_, err = c.Write(opt)
	}
	for err == nil {
		var h [20]byte
		if _, err = io.ReadFull(c, h[:]); err != nil {
			break
		}
		if _, err = io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(h[16:]))); err != nil {
			break
		}
		switch typ := binary.BigEndian.Uint32(h[12:]); {
		case typ == 1: // ack
			// The server counts the client after this, before it answers a request.
			if _, err = c.Write(readRequest); err == nil {
				_, err = io.ReadFull(c, make([]byte, 16+4096))
			}
			if err == nil {
				return c
			}
		case typ&(1<<31) != 0:
			b.t.Fatalf("volume %s: the server answers %#x", volume, typ)
		}
	}
	b.t.Fatal(err)
	return nil
}

// TestClientsOfVolumes: a volume with clients is not deleted, and a release
// does not wait for a request that takes too long.
func TestClientsOfVolumes(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	client := b.attach("v")
	if err := c.DeleteVolume(ctx, "v"); control.KindOf(err) != control.KindRefused {
		t.Errorf("a volume with a client: %v", err)
	}
	s := b.storage.last()
	s.deaf.Store(true)
	reads := s.reads.Load()
	if _, err := client.Write(readRequest); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(30 * time.Second)
	for s.reads.Load() == reads {
		if time.Now().After(end) {
			t.Fatal("the read did not arrive")
		}
	}
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1, Reason: "test"})
	b.expect(partner.KindReleased)
	if _, err := io.ReadAll(client); err != nil && !os.IsTimeout(err) {
		t.Logf("the client is cut: %v", err)
	} else if err != nil {
		t.Error("the client was not told that its server has gone")
	}
}

// TestAllowLists: an export has its own list, else the server's, and none with
// a list that cannot be read.
func TestAllowLists(t *testing.T) {
	s := &fakeStore{volumes: map[string]int64{"own": 4096, "common": 4096, "wrong": 4096}}
	e := exports{t: &tenancy{store: s}, cfg: &config.Config{
		NBD:     config.NBD{Allow: []string{"10.0.0.0/8"}},
		Exports: map[string]config.Export{"own": {Allow: []string{"192.0.2.1"}}, "wrong": {Allow: []string{"nobody"}}},
	}}
	for name, want := range map[string]string{"own": "192.0.2.1/32", "common": "10.0.0.0/8"} {
		x, err := e.Lookup(name)
		if err != nil || len(x.Allow) != 1 || x.Allow[0].String() != want {
			t.Errorf("%s: %v, %v", name, x.Allow, err)
		}
	}
	for _, name := range []string{"wrong", "nobody"} {
		if x, err := e.Lookup(name); err == nil {
			t.Errorf("%s is served: %+v", name, x)
		}
	}
	if l := e.List(); len(l) != 2 {
		t.Errorf("%+v", l)
	}
	if l := (exports{t: &tenancy{}}).List(); len(l) != 0 {
		t.Errorf("without a pool: %+v", l)
	}
}

func TestURIs(t *testing.T) {
	port := 10809
	for address, want := range map[string]string{
		"0.0.0.0": "nbd://localhost:10809/v", "::": "nbd://localhost:10809/v", "::1": "nbd://[::1]:10809/v", "host": "nbd://host:10809/v",
	} {
		if tcp, _ := URIs(&config.Guest{Address: address, Port: &port}, "v"); tcp != want {
			t.Errorf("%s: %s", address, tcp)
		}
	}
}

// TestReadTLS: the certificate is taken as it is in its files.
func TestReadTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := config.NBD{TLS: "required", Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key")}
	for path, b := range map[string]*pem.Block{c.Cert: {Type: "CERTIFICATE", Bytes: der}, c.Key: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readTLS(nbd.TLSRequired, c)
	if err != nil || got.Mode != nbd.TLSRequired || !bytes.Equal(got.Config.Certificates[0].Certificate[0], der) || got.Config.ClientCAs != nil {
		t.Errorf("%+v, %v", got, err)
	}
	c.CA = c.Cert
	if got, err := readTLS(nbd.TLSRequired, c); err != nil || got.Config.ClientCAs == nil {
		t.Errorf("with an authority: %+v, %v", got, err)
	}
	c.CA = c.Key
	if _, err := readTLS(nbd.TLSRequired, c); err == nil {
		t.Error("a key is no authority")
	}
}
