package hpdi

import (
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"
)

// What a driver tells of a range stays within it and within the place there is for it.
func TestAddExtent(t *testing.T) {
	r := Request{Op: OpStatus, Offset: 8192, Length: 64, Extents: make([]Extent, 0, 3)}
	for i, c := range []struct {
		n     int64
		state ExtentState
		more  bool
		want  []Extent
	}{
		{16, Data, true, []Extent{{16, Data}}},
		{8, Data, true, []Extent{{24, Data}}},
		{0, Hole, true, []Extent{{24, Data}}},
		{8, Hole, true, []Extent{{24, Data}, {8, Hole}}},
		{8, Zero, true, []Extent{{24, Data}, {8, Hole}, {8, Zero}}},
		{8, Zero, true, []Extent{{24, Data}, {8, Hole}, {16, Zero}}}, // the last may grow
		{8, Data, false, []Extent{{24, Data}, {8, Hole}, {16, Zero}}},
	} {
		if more := r.AddExtent(c.n, c.state); more != c.more || !slices.Equal(r.Extents, c.want) {
			t.Fatalf("step %d: %v, %v, want %v, %v", i, r.Extents, more, c.want, c.more)
		}
	}
	r.Extents = r.Extents[:0]
	if r.AddExtent(100, Hole) || !slices.Equal(r.Extents, []Extent{{64, Hole}}) {
		t.Errorf("beyond the range: %v", r.Extents)
	}
	if r.AddExtent(1, Hole) || !slices.Equal(r.Extents, []Extent{{64, Hole}}) {
		t.Errorf("after its end: %v", r.Extents)
	}
}

func TestCheckStatus(t *testing.T) {
	info := Info{Size: 1 << 20, BlockSize: 4096, ReadOnly: true, Status: true}
	place := make([]Extent, 0, 1)
	for _, c := range []struct {
		r    Request
		info Info
		want error
	}{
		{Request{Length: 1 << 20, Extents: place}, info, nil},
		{Request{Offset: 1 << 20, Extents: place}, info, nil},
		{Request{Length: 4096, Extents: place}, info.Plain(), ErrUnsupported},
		{Request{Length: 4096}, info, ErrExtents},
		{Request{Length: 4096, Extents: append(place, Extent{1, Data})}, info, ErrExtents},
		{Request{Length: 4096, Extents: place, Durable: true}, info, ErrUnsupported},
		{Request{Length: 512, Extents: place}, info, ErrAlign},
		{Request{Offset: 4096, Length: 1 << 20, Extents: place}, info, ErrRange},
		{Request{Offset: 4096, Length: -4096, Extents: place}, info, ErrRange},
	} {
		c.r.Op = OpStatus
		if err := c.r.Check(c.info); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v, want %v", c.r, err, c.want)
		}
	}
}

func TestLate(t *testing.T) {
	at := time.Unix(100, 0)
	r := Request{}
	if err := r.Late(at); err != nil {
		t.Errorf("without a deadline: %v", err)
	}
	r.Deadline = at
	if err := r.Late(at.Add(-1)); err != nil {
		t.Errorf("before it: %v", err)
	}
	if err := r.Late(at); !errors.Is(err, ErrDeadline) {
		t.Errorf("at it: %v", err)
	}
}

// An error by number is of a kind, and the number as well.
func TestErrno(t *testing.T) {
	for e, kind := range map[syscall.Errno]error{
		syscall.EIO: ErrIO, syscall.ENOSPC: ErrNoSpace, syscall.EDQUOT: ErrNoSpace, syscall.EROFS: ErrReadOnly,
		syscall.EOPNOTSUPP: ErrUnsupported, syscall.ECANCELED: ErrCanceled, syscall.EPIPE: ErrDisconnected,
		syscall.EINVAL: nil,
	} {
		err := Errno(e)
		if !errors.Is(err, e) || err.Error() != e.Error() {
			t.Errorf("%v became %v", e, err)
		}
		if kind != nil && !errors.Is(err, kind) {
			t.Errorf("%v is not %v", e, kind)
		}
		if errors.Is(err, ErrClosed) {
			t.Errorf("%v is %v", e, ErrClosed)
		}
	}
	if !errors.Is(Errno(syscall.EACCES), os.ErrPermission) {
		t.Error("what the number is for others is lost")
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		OpStatus.String(): "block-status", Op(99).String(): "op(99)",
		Data.String(): "data", Hole.String(): "hole", Zero.String(): "zero", ExtentState(9).String(): "state(9)",
		CancelNone.String(): "none", CancelQueued.String(): "queued", CancelAll.String(): "all",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
