package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

// Copier writes an image into an export and calls halfway once, when about
// half of it is written. The program that copies goes on meanwhile.
type Copier func(ctx context.Context, img Image, uri string, halfway func(Program)) error

// Program is one that copies.
type Program struct{ pid int }

// Running tells whether the program has not ended yet: what was done before
// that was done in the middle of the copy.
func (p Program) Running() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	// The state follows the name, which may have anything in it.
	i := bytes.LastIndexByte(stat, ')')
	return err == nil && i > 0 && !bytes.HasPrefix(stat[i+1:], []byte(" Z"))
}

// progress matches the percentage that nbdcopy ("50/100") and qemu-img
// ("(50.01/100%)") print.
var progress = regexp.MustCompile(`([0-9]+)(?:\.[0-9]+)?/100`)

// watch reads a program's progress and calls halfway at 50 percent, or when
// the program ends without having told.
func watch(r io.Reader, halfway func()) {
	in := bufio.NewScanner(r)
	in.Split(scanProgress)
	called := false
	for in.Scan() {
		if m := progress.FindSubmatch(in.Bytes()); m != nil && !called {
			if percent, _ := strconv.Atoi(string(m[1])); percent >= 50 {
				called = true
				halfway()
			}
		}
	}
	if !called {
		halfway()
	}
}

// scanProgress splits at both kinds of line end: qemu-img overwrites its line.
func scanProgress(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// Nbdcopy copies with nbdcopy, which knows no reconnection itself,
// through nbdkit, whose retry filter opens the connection again. The socket
// and log of nbdkit are in dir.
func Nbdcopy(dir string) Copier {
	return func(ctx context.Context, img Image, uri string, halfway func(Program)) error {
		socket := filepath.Join(dir, "retry.sock")
		os.Remove(socket)
		kit := exec.CommandContext(ctx, "nbdkit", "-f", "-U", socket, "--filter=retry",
			"nbd", "uri="+uri, "retries=30", "retry-delay=1", "retry-exponential=no")
		log, err := os.Create(filepath.Join(dir, "nbdkit.log"))
		if err != nil {
			return err
		}
		defer log.Close()
		kit.Stderr = log
		if err := kit.Start(); err != nil {
			return err
		}
		defer func() {
			kit.Process.Signal(syscall.SIGTERM)
			kit.Wait()
		}()
		if err := listening(ctx, socket); err != nil {
			said, _ := os.ReadFile(log.Name())
			return commandError(ctx, "nbdkit", err, string(said))
		}
		pr, pw, err := os.Pipe()
		if err != nil {
			return err
		}
		defer pr.Close()
		cmd := exec.CommandContext(ctx, "nbdcopy", "--flush", "--progress=3",
			img.Path, "nbd+unix:///?socket="+socket)
		cmd.ExtraFiles = []*os.File{pw}
		var complaint bytes.Buffer
		cmd.Stderr = &complaint
		err = cmd.Start()
		pw.Close()
		if err != nil {
			return err
		}
		watch(pr, func() { halfway(Program{cmd.Process.Pid}) })
		if err := cmd.Wait(); err != nil {
			return commandError(ctx, "nbdcopy", err, complaint.String())
		}
		return nil
	}
}

// listening waits until somebody accepts on a socket.
func listening(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// ServeFile serves a file, which outlives the server, on a socket until stop
// kills the server: a stand-in for a guest in tests of clients.
func ServeFile(ctx context.Context, socket, file string) (stop func(), err error) {
	os.Remove(socket)
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "file", file)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if err := listening(ctx, socket); err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// QemuImg copies with qemu-img, whose NBD client connects again by
// itself for as long as reconnect-delay says.
func QemuImg(ctx context.Context, img Image, uri string, halfway func(Program)) error {
	u, err := url.Parse(uri)
	if err != nil {
		return err
	}
	target := fmt.Sprintf("driver=nbd,server.type=unix,server.path=%s,export=%s,reconnect-delay=60",
		u.Query().Get("socket"), u.Path[1:])
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-p", "-n", "-f", "raw",
		"--target-image-opts", img.Path, target)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	watch(out, func() { halfway(Program{cmd.Process.Pid}) })
	if err := cmd.Wait(); err != nil {
		return commandError(ctx, "qemu-img", err, complaint.String())
	}
	return nil
}

// ReadBack copies an export into a file and returns its checksum.
func ReadBack(ctx context.Context, uri, path string) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	// To a pipe nbdcopy writes every byte in order, holes as zeroes.
	cmd := exec.CommandContext(ctx, "nbdcopy", uri, "-")
	var complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(f, h), &complaint
	if err := cmd.Run(); err != nil {
		return "", commandError(ctx, "nbdcopy", err, complaint.String())
	}
	return fmt.Sprintf("%x", h.Sum(nil)), f.Close()
}

// Verify reads an export back into dir: it must hold the image, and e2fsck must
// have nothing to complain about.
func (img Image) Verify(ctx context.Context, dir, uri string) error {
	back := filepath.Join(dir, "back.ext4")
	defer os.Remove(back)
	sum, err := ReadBack(ctx, uri, back)
	if err != nil {
		return err
	}
	if sum != img.Sum {
		return fmt.Errorf("the image read back differs: sha256 %s instead of %s", sum, img.Sum)
	}
	_, err = Run(ctx, "e2fsck", "-fn", back)
	return err
}
