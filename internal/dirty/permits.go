package dirty

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// Capacity returns the number of permits there are.
func (s *Set) Capacity() int { return s.capacity }

// Acquire waits for room for n blocks of payload and returns their extents.
func (s *Set) Acquire(ctx context.Context, n int, dst []oplog.Extent) ([]oplog.Extent, error) {
	if err := s.Permit(ctx, n); err != nil {
		return dst, err
	}
	return s.Take(n, dst)
}

// TryAcquire is Acquire without waiting; ok is false when there is no room.
func (s *Set) TryAcquire(n int, dst []oplog.Extent) (ext []oplog.Extent, ok bool, err error) {
	if !s.tryPermit(n) {
		s.full()
		return dst, false, nil
	}
	ext, err = s.Take(n, dst)
	return ext, err == nil, err
}

func (s *Set) tryPermit(n int) bool {
	if !s.permits.TryAcquire(int64(n)) {
		return false
	}
	if s.used.Add(int64(n)) >= s.due {
		s.full()
	}
	return true
}

func (s *Set) givePermits(n int64) {
	s.used.Add(-n)
	s.permits.Release(n)
}

// Permit waits for n permits without extents, for records without payload.
func (s *Set) Permit(ctx context.Context, n int) error {
	if s.tryPermit(n) {
		return nil
	}
	if n > s.Capacity() {
		return fmt.Errorf("write of %d blocks into a log of %d: %w", n, s.Capacity(), block.ErrInvalid)
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	s.full()
	if err := s.permits.Acquire(ctx, int64(n)); err != nil {
		return fmt.Errorf("wait for room in the operation log: %w", err)
	}
	s.used.Add(int64(n))
	return nil
}

// Take returns extents for n permits that the caller has. With an error the
// permits are gone.
func (s *Set) Take(n int, dst []oplog.Extent) ([]oplog.Extent, error) {
	ext, ok := s.log.Alloc(n, dst)
	if !ok {
		// Extents of a record that was damaged in memory can be lost until
		// the log is attached anew.
		s.givePermits(int64(n))
		return dst, fmt.Errorf("the operation log lacks extents that it should have: %w", block.ErrCorrupt)
	}
	for _, e := range ext[len(ext)-n:] {
		s.prints[e] = 0
	}
	return ext, nil
}

// SetPrint remembers the fingerprint of a whole block that was received in an extent, when
// its bytes are in the processor's cache. A consistency point computes those that are not
// known, as after a takeover: they are not in the log. The extent is not published yet.
func (s *Set) SetPrint(e oplog.Extent, print uint64) { s.prints[e] = print }

// Print returns the fingerprint of a published extent, or 0.
func (s *Set) Print(e oplog.Extent) uint64 { return s.prints[e] }

// Give returns extents that were acquired and not published.
func (s *Set) Give(ext []oplog.Extent) {
	s.log.Free(ext)
	s.givePermits(int64(len(ext)))
}

// GivePermits returns n permits that came from Permit and were not used.
func (s *Set) GivePermits(n int) { s.givePermits(int64(n)) }

// Payload returns the memory of n consecutive extents.
func (s *Set) Payload(first oplog.Extent, n int) []byte { return s.log.Payload(first, n) }
