package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// readTLS makes a configuration of a folder as QEMU, nbdkit and libnbd have it: ca-cert.pem
// has the authorities to trust, and client-cert.pem with client-key.pem, if they are there,
// are what the server is shown.
func readTLS(dir string) (*tls.Config, error) {
	ca := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("authorities to trust: %w", err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("authorities to trust: no certificate in %s", ca)
	}
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	switch {
	case err == nil:
		c.Certificates = []tls.Certificate{own}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("certificate of the client: %w", err)
	}
	return c, nil
}
