package hpditest

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// plain is a device on a file that does one request at a time, by copies if it is told to.
type plain struct {
	f            *os.File
	copies, half bool // half: it copies what it reads alone
}

type plainQueue struct {
	hpdi.Plain
	d    *plain
	done []*hpdi.Request
}

func (d *plain) Info() hpdi.Info {
	return hpdi.Info{Name: "plain", Driver: "plain", Size: MinSize, BlockSize: 512}
}
func (d *plain) NewQueue(int) (hpdi.Queue, error) { return &plainQueue{d: d}, nil }
func (d *plain) Register([]byte) error            { return nil }
func (d *plain) Unregister([]byte) error          { return nil }
func (d *plain) Close() error                     { return d.f.Close() }

func (q *plainQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		fd, vec := int(q.d.f.Fd()), r.Vec
		if q.d.copies || q.d.half && r.Op == hpdi.OpRead {
			vec = [][]byte{make([]byte, r.Bytes())}
			if at := vec[0]; r.Op == hpdi.OpWrite {
				for _, v := range r.Vec {
					at = at[copy(at, v):]
				}
			}
		}
		if r.Op == hpdi.OpWrite {
			_, r.Err = unix.Pwritev(fd, vec, r.Offset)
		} else if _, r.Err = unix.Preadv(fd, vec, r.Offset); len(r.Vec) != len(vec) || &r.Vec[0][0] != &vec[0][0] {
			at := vec[0]
			for _, v := range r.Vec {
				at = at[copy(v, at):]
			}
		}
		q.done = append(q.done, r)
	}
	return nil
}

func (q *plainQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	done = append(done, q.done...)
	q.done = q.done[:0]
	return done, nil
}

func (q *plainQueue) Close() error { return nil }

// A driver that copies is found out, and one that does not is not.
func TestZeroCopyFindsCopies(t *testing.T) {
	for _, x := range []struct {
		name string
		d    plain
		want []string // in what is said, one by one
	}{
		{"honest", plain{}, nil},
		{"copies", plain{copies: true}, []string{"bytes that were written did not go", "bytes were written, ", "bytes that were read did not go", "bytes were read, "}},
		{"copies what it reads", plain{half: true}, []string{"bytes that were read did not go", "bytes were read, "}},
	} {
		t.Run(x.name, func(t *testing.T) {
			said := zeroCopy(t, func(t *testing.T) hpdi.Device {
				f, err := os.CreateTemp(t.TempDir(), "")
				if err != nil {
					t.Fatal(err)
				}
				d := x.d
				d.f = f
				return &d
			})
			if os.Getenv(traced) != "" {
				return // what is watched has nothing to say
			}
			all := strings.Join(said, "\n")
			if len(said) != len(x.want) {
				t.Errorf("it says: %s", all)
			}
			for _, want := range x.want {
				if !strings.Contains(all, want) {
					t.Errorf("it does not say %q: %s", want, all)
				}
			}
		})
	}
}
