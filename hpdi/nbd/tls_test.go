package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// certificates makes a folder with an authority and what it has signed for a server with a
// name, and for a client.
func certificates(t *testing.T, host string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, b []byte) {
		must(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600))
	}
	template := func(n int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(n), Subject: pkix.Name{CommonName: fmt.Sprintf("test %d", n)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		return k
	}
	authority, authorityKey := template(1), key()
	authority.IsCA = true
	b, err := x509.CreateCertificate(rand.Reader, authority, authority, &authorityKey.PublicKey, authorityKey)
	must(t, err)
	write("ca-cert.pem", "CERTIFICATE", b)
	for n, name := range []string{"server", "client"} {
		c, k := template(int64(n+2)), key()
		if name == "server" {
			c.DNSNames = []string{host}
		}
		b, err := x509.CreateCertificate(rand.Reader, c, authority, &k.PublicKey, authorityKey)
		must(t, err)
		write(name+"-cert.pem", "CERTIFICATE", b)
		b, err = x509.MarshalPKCS8PrivateKey(k)
		must(t, err)
		write(name+"-key.pem", "PRIVATE KEY", b)
	}
	return dir
}

// fromURI opens a device with the options that its URI has.
func fromURI(t *testing.T, uri string) (hpdi.Device, error) {
	t.Helper()
	u, err := url.Parse(uri)
	must(t, err)
	o, err := ParseOptions(u.Query())
	if err != nil {
		return nil, err
	}
	return Open(t.Context(), uri, o)
}

// A server is believed that has a certificate of whom one trusts, for the name that one
// expects, and is shown the client's.
func TestTLS(t *testing.T) {
	dir, other := certificates(t, "storage.test"), certificates(t, "storage.test")
	socket := strings.TrimPrefix(serve(t, "nbdkit", "-f", "-U", "SOCKET", "--tls=require", "--tls-certificates="+dir, "--tls-verify-peer", "memory", fmt.Sprint(hpditest.MinSize)), "nbd+unix:///?socket=")
	at := "nbds+unix:///?socket=" + socket
	d, err := fromURI(t, at+"&tls-hostname=storage.test&tls-certificates="+dir)
	must(t, err)
	q, err := d.NewQueue(4)
	must(t, err)
	// Payload that comes in records of TLS, some of it given up.
	page := bytes.Repeat([]byte{5}, 256<<10)
	must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{page}}))
	got := make([]byte, len(page))
	for range 20 {
		lost := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, len(page))}}
		kept := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{got[:100<<10], got[100<<10:]}}
		clear(got)
		must(t, q.Submit(lost, kept))
		q.Cancel(lost)
		done, err := q.Wait(2, nil)
		if must(t, err); len(done) != 2 || kept.Err != nil || lost.Err != nil && !errors.Is(lost.Err, hpdi.ErrCanceled) {
			t.Fatalf("%d came, with %v and %v", len(done), lost.Err, kept.Err)
		}
		if !bytes.Equal(got, page) {
			t.Fatal("something else was read")
		}
	}
	must(t, q.Close())
	must(t, d.Close())

	for query, want := range map[string]string{
		"&tls-hostname=storage.test&tls-certificates=" + other: "TLS: ",
		"&tls-hostname=else.test&tls-certificates=" + dir:      "not else.test",
		"&tls-hostname=storage.test":                           "TLS: ",
		"&tls-certificates=" + t.TempDir():                     `property "tls-certificates": authorities to trust: open `,
	} {
		if d, err := fromURI(t, at+query); err == nil {
			t.Errorf("%s: it is open", query)
			must(t, d.Close())
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", query, err)
		}
	}
	if d, err := fromURI(t, "nbd+unix:///?socket="+socket); err == nil || !strings.Contains(err.Error(), "nbds://") {
		t.Errorf("without TLS: %v, %v", d, err)
	}
	must(t, os.WriteFile(filepath.Join(other, "client-key.pem"), []byte("rubbish"), 0o600))
	if _, err := readTLS(other); err == nil || !strings.Contains(err.Error(), "certificate of the client") {
		t.Errorf("a key of no use: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(other, "ca-cert.pem"), []byte("rubbish"), 0o600))
	if _, err := readTLS(other); err == nil || !strings.Contains(err.Error(), "no certificate in ") {
		t.Errorf("authorities of no use: %v", err)
	}
	if _, err := Open(t.Context(), "nbds://test/disk", Options{Dial: newServer(1 << 20).dial(false)}); err == nil || !strings.Contains(err.Error(), "the server knows no TLS") {
		t.Errorf("a server without TLS: %v", err)
	}
}
