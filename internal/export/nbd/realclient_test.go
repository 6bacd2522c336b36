package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// program finds a client, or skips the test; with POLLUX_REQUIRE_CLIENTS=1 a
// missing client is a failure.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		msg := fmt.Sprintf("%s is not installed (Debian package %s)", name, pkg)
		if os.Getenv("POLLUX_REQUIRE_CLIENTS") == "1" {
			t.Fatal(msg)
		}
		t.Skip(msg)
	}
	return path
}

// runClient runs a client for at most a minute and returns what it printed.
func runClient(t *testing.T, path string, args ...string) string {
	t.Helper()
	out, err := tryClient(t, path, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", path, strings.Join(args, " "), err, out)
	}
	return out
}

func tryClient(t *testing.T, path string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h *harness) unixURI(name string) string { return "nbd+unix:///" + name + "?socket=" + h.unix }
func (h *harness) tcpURI(name string) string  { return "nbd://" + h.tcp + "/" + name }

// image writes a file with data and holes.
func image(t *testing.T, size int64) string {
	t.Helper()
	seed := testSeed(t)
	rng := mrand.New(mrand.NewPCG(seed, 3))
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < size; {
		n := min(size-off, 4096*(1+rng.Int64N(60)))
		if rng.IntN(2) == 0 {
			b := make([]byte, n)
			rand.Read(b)
			if _, err := f.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
		}
		off += n
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func (h *harness) mustEqual(v *nbdtest.Volume, path string) {
	h.t.Helper()
	want, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	if !bytes.Equal(want, v.Bytes(0, int64(len(want)))) {
		h.t.Errorf("the volume differs from %s", path)
	}
}

func TestNbdinfo(t *testing.T) {
	nbdinfo := program(t, "nbdinfo", "libnbd-bin")
	v := nbdtest.New("v", 8<<20)
	v2 := nbdtest.New("w", 4<<20)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Volume: v2, ReadOnly: true}}}})
	h.dialUnix().enter("v").expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 1<<20, 4096, pattern(1, 4096))
	out := runClient(t, nbdinfo, "--list", "nbd+unix://?socket="+h.unix)
	for _, want := range []string{`export="v"`, `export="w"`, "base:allocation", "is_read_only: true"} {
		if !strings.Contains(out, want) {
			t.Errorf("nbdinfo --list lacks %s:\n%s", want, out)
		}
	}
	var info struct {
		Protocol string
		Exports  []map[string]any
	}
	if err := json.Unmarshal([]byte(runClient(t, nbdinfo, "--json", h.tcpURI("v"))), &info); err != nil {
		t.Fatal(err)
	}
	x := info.Exports[0]
	for _, can := range []string{"can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"} {
		if x[can] != true {
			t.Errorf("%s is %v", can, x[can])
		}
	}
	if info.Protocol != "newstyle-fixed" || x["export-size"] != float64(8<<20) || x["block_size_minimum"] != 1.0 || x["block_size_maximum"] != float64(32<<20) {
		t.Errorf("nbdinfo --json: %+v", info)
	}
	var extents []struct {
		Offset, Length int64
		Type           int
	}
	if err := json.Unmarshal([]byte(runClient(t, nbdinfo, "--map", "--json", h.unixURI("v"))), &extents); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(extents); got != "[{0 1048576 3} {1048576 4096 0} {1052672 7335936 3}]" {
		t.Errorf("nbdinfo --map: %s", got)
	}
}

func TestNbdcopy(t *testing.T) {
	nbdcopy := program(t, "nbdcopy", "libnbd-bin")
	const size = 24 << 20
	v := nbdtest.New("v", size)
	h := serveVolume(t, v, Limits{})
	src := image(t, size)
	runClient(t, nbdcopy, "--flush", src, h.unixURI("v"))
	h.mustEqual(v, src)
	if v.Unstable() != 0 {
		t.Error("nbdcopy --flush left unstable changes")
	}
	back := filepath.Join(t.TempDir(), "back")
	runClient(t, nbdcopy, h.tcpURI("v"), back)
	h.mustEqual(v, back)
}

func TestQemuImg(t *testing.T) {
	qemu := program(t, "qemu-img", "qemu-utils")
	const size = 16 << 20
	v := nbdtest.New("v", size)
	h := serveVolume(t, v, Limits{})
	src := image(t, size)
	runClient(t, qemu, "convert", "-n", "-f", "raw", "-O", "raw", src, h.unixURI("v"))
	h.mustEqual(v, src)
	runClient(t, qemu, "compare", "-f", "raw", "-F", "raw", src, h.tcpURI("v"))
	if out := runClient(t, qemu, "map", "--output=json", "-f", "raw", h.unixURI("v")); !strings.Contains(out, `"zero": true`) {
		t.Errorf("qemu-img map sees no holes:\n%s", out)
	}
	runClient(t, qemu, "bench", "-c", "2000", "-d", "32", "-w", "-t", "none", "-f", "raw", h.unixURI("v"))
}

func TestQemuIO(t *testing.T) {
	qemu := program(t, "qemu-io", "qemu-utils")
	v := nbdtest.New("v", 8<<20)
	h := serveVolume(t, v, Limits{})
	out := runClient(t, qemu, "-f", "raw",
		"-c", "write -P 0x5a 1000 70000", "-c", "read -P 0x5a 1000 70000",
		"-c", "write -z 4096 8192", "-c", "read -P 0 4096 8192",
		"-c", "write -z -u 65536 4096", "-c", "discard 16384 32768",
		"-c", "write -f -P 0x11 1M 2M", "-c", "read -P 0x11 1M 2M",
		"-c", "aio_write -P 7 4M 1M", "-c", "aio_flush", "-c", "flush", h.unixURI("v"))
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if !bytes.Equal(v.Bytes(4<<20, 1<<20), bytes.Repeat([]byte{7}, 1<<20)) {
		t.Error("aio_write is not in the volume")
	}
}

func TestFio(t *testing.T) {
	fio := program(t, "fio", "fio")
	v := nbdtest.New("v", 16<<20)
	v.Hook = func(ctx context.Context, op nbdtest.Op, off, n int64) error {
		if mrand.N(4) == 0 {
			return wouldWait(ctx, op, off, n)
		}
		return nil
	}
	h := serveVolume(t, v, Limits{})
	runClient(t, fio, "--name=verify", "--ioengine=nbd", "--uri="+h.unixURI("v"), "--rw=randwrite",
		"--bs=4k", "--iodepth=16", "--size=16M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
}

func TestNbdsh(t *testing.T) {
	nbdsh, err := exec.LookPath("nbdsh") // not among the clients that make test requires
	if err != nil {
		t.Skip("nbdsh is not installed (Debian package python3-libnbd)")
	}
	h := serveVolume(t, nbdtest.New("v", 8<<20), Limits{})
	runClient(t, nbdsh, "-u", h.unixURI("v"), "-c", "h.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_FUA)", "-c", "assert h.pread(512, 0) == b'x' * 512")
}

// certificates writes an authority, a server and a client certificate to a
// folder in the form libnbd and QEMU expect.
func certificates(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	caKey, ca := certificate(t, dir, "ca", nil, nil)
	certificate(t, dir, "server", ca, caKey)
	certificate(t, dir, "client", ca, caKey)
	return dir
}

func certificate(t *testing.T, dir, name string, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<60))
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "pollux test " + name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if parent == nil {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for suffix, b := range map[string]*pem.Block{
		"-cert.pem": {Type: "CERTIFICATE", Bytes: der}, "-key.pem": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(dir, name+suffix), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return key, c
}

// serverTLS reads the server's side of a certificate folder.
func serverTLS(t *testing.T, dir string, clientsShow bool) *tls.Config {
	t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var ca []byte
	if clientsShow {
		ca = read("ca-cert.pem")
	}
	cfg, err := NewTLSConfig(read("server-cert.pem"), read("server-key.pem"), ca)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestTLSModes(t *testing.T) {
	cfg := serverTLS(t, certificates(t), false)
	trust := &tls.Config{InsecureSkipVerify: true}
	v := nbdtest.New("v", testSize)
	list := []Export{{Name: "v", Volume: v}, {Name: "secret", Volume: v, RequireTLS: true}}
	t.Run("required", func(t *testing.T) {
		h := start(t, Config{Exports: &exports{list: list}, TLS: TLS{Mode: TLSRequired, Config: cfg}})
		c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
		for _, opt := range []uint32{nbdproto.OptList, nbdproto.OptInfo, nbdproto.OptGo, nbdproto.OptStructured, nbdproto.OptSetContext, 4711} {
			c.expectOption(opt, nil, nbdproto.RepErrTLSReqd)
		}
		c.startTLS(trust)
		c.expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepErrInvalid)
		c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
		c.structured = true
		p := pattern(1, 1<<20)
		c.goTo("v").expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 1<<20, p)
		if r := c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 1<<20, nil); !bytes.Equal(r.data, p) {
			t.Error("data came back changed")
		}
		c = h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
		c.write(optionBytes(nbdproto.OptExportName, []byte("v")))
		c.expectCut()
		h.dialUnix().hello(nbdproto.FlagFixedNewstyle).expectOption(nbdproto.OptGo, goData("v"), nbdproto.RepErrTLSReqd)
	})
	t.Run("free on unix sockets", func(t *testing.T) {
		h := start(t, Config{Exports: &exports{list: list}, TLS: TLS{Mode: TLSRequired, Config: cfg, FreeUnix: true}})
		h.dialUnix().enter("v")
	})
	t.Run("allowed", func(t *testing.T) {
		h := start(t, Config{Exports: &exports{list: list}, TLS: TLS{Mode: TLSAllowed, Config: cfg}})
		c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
		if r := c.expectOption(nbdproto.OptList, nil, nbdproto.RepAck); len(r) != 2 {
			t.Errorf("in clear %d exports are listed", len(r)-1)
		}
		c.expectOption(nbdproto.OptGo, goData("secret"), nbdproto.RepErrTLSReqd)
		c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
		c.expectOption(nbdproto.OptSetContext, contextData("secret", nbdproto.ContextAllocation), nbdproto.RepErrTLSReqd)
		c.startTLS(trust)
		// What was negotiated in clear is forgotten.
		c.expectOption(nbdproto.OptSetContext, contextData("v", nbdproto.ContextAllocation), nbdproto.RepErrInvalid)
		c.goTo("secret").expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
		h.dialTCP().enter("v").expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
	})
	t.Run("injection", func(t *testing.T) {
		h := start(t, Config{Exports: &exports{list: list}, TLS: TLS{Mode: TLSAllowed, Config: cfg}})
		c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
		c.write(cat(optionBytes(nbdproto.OptStartTLS, nil), optionBytes(nbdproto.OptList, nil)))
		c.expectCut()
	})
	t.Run("client does not shake hands", func(t *testing.T) {
		h := start(t, Config{Exports: &exports{list: list}, TLS: TLS{Mode: TLSAllowed, Config: cfg}})
		c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle)
		c.expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepAck)
		c.write(bytes.Repeat([]byte("not TLS"), 10))
		for { // an alert, then the end
			if _, err := c.nc.Read(make([]byte, 100)); err != nil {
				break
			}
		}
	})
}

func TestTLSRealClients(t *testing.T) {
	dir := certificates(t)
	const size = 8 << 20
	v := nbdtest.New("v", size)
	h := start(t, Config{
		Exports: &exports{list: []Export{{Name: "v", Volume: v}}},
		TLS:     TLS{Mode: TLSRequired, Config: serverTLS(t, dir, true)},
	})
	uri := strings.Replace(h.tcpURI("v"), "nbd:", "nbds:", 1) + "?tls-certificates=" + dir
	src := image(t, size)
	t.Run("nbdcopy", func(t *testing.T) {
		nbdcopy := program(t, "nbdcopy", "libnbd-bin")
		runClient(t, nbdcopy, src, uri)
		h.mustEqual(v, src)
		if out, err := tryClient(t, nbdcopy, src, h.tcpURI("v")); err == nil {
			t.Errorf("a client without TLS was let in:\n%s", out)
		}
	})
	t.Run("nbdinfo", func(t *testing.T) {
		nbdinfo := program(t, "nbdinfo", "libnbd-bin")
		if out := runClient(t, nbdinfo, uri); !strings.Contains(out, "with TLS") {
			t.Errorf("nbdinfo:\n%s", out)
		}
		other := certificates(t) // another authority
		if out, err := tryClient(t, nbdinfo, strings.Replace(uri, dir, other, 1)); err == nil {
			t.Errorf("a client with a foreign certificate was let in:\n%s", out)
		}
	})
	t.Run("qemu-img", func(t *testing.T) {
		qemu := program(t, "qemu-img", "qemu-utils")
		_, port, _ := net.SplitHostPort(h.tcp)
		runClient(t, qemu, "compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+dir, "--image-opts",
			"driver=raw,file.driver=file,file.filename="+src,
			"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port="+port+",file.export=v,file.tls-creds=tls0")
	})
}
