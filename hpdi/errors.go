package hpdi

import (
	"errors"
	"syscall"
)

// Errors of requests and devices. Drivers wrap them with what was being done.
var (
	// ErrRange: the request reaches past the device.
	ErrRange = errors.New("beyond the end of the device")
	// ErrAlign: offset or vectors are not multiples of the block size.
	ErrAlign = errors.New("not aligned to the device's block size")
	// ErrUnsupported: the device cannot do this operation.
	ErrUnsupported = errors.New("operation not supported by the device")
	// ErrMemory: a vector is not in memory that the device can share with its peer,
	// see Info.SharedMemory.
	ErrMemory = errors.New("memory is not from hpdi.Alloc and cannot be shared with the device")
	// ErrExtents: a block status has no place for its answer, or holds an old one.
	ErrExtents = errors.New("extents are not empty with a capacity of at least one")
	// ErrReadOnly: the device was opened for reading only.
	ErrReadOnly = errors.New("device is open for reading only")
	// ErrClosed: the queue or device was closed.
	ErrClosed = errors.New("device is closed")
	// ErrCanceled: the request was cancelled. Whether it had an effect is not known.
	ErrCanceled = errors.New("request was cancelled")
	// ErrDeadline: the request's deadline has passed. Whether it had an effect is
	// not known.
	ErrDeadline = errors.New("deadline of the request has passed")
	// ErrDisconnected: what served the device is gone.
	ErrDisconnected = errors.New("peer that serves the device is gone")
	// ErrNoSpace: there is no room for what was to be written.
	ErrNoSpace = errors.New("no space left")
	// ErrIO: the device, or what serves it, has failed at the request.
	ErrIO = errors.New("input or output error")
	// ErrProperty: a URI has a property that its driver does not take, or one with a
	// value that it cannot have.
	ErrProperty = errors.New("property")
	// ErrNoCopy: the copy that was asked for is away or not filled yet.
	ErrNoCopy = errors.New("this copy is away or not filled yet")
	// ErrLocked: somebody else has the device open.
	ErrLocked = errors.New("device is locked by another process")
)

// Errno returns an error that is both what the kernel or a peer has answered and,
// where there is one, the kind of this package that it stands for. Its text is that
// of the number.
func Errno(e syscall.Errno) error {
	if kind := kindOf(e); kind != nil {
		return &errno{e, kind}
	}
	return e
}

type errno struct {
	syscall.Errno
	kind error
}

func (e *errno) Unwrap() []error { return []error{e.Errno, e.kind} }

func kindOf(e syscall.Errno) error {
	switch e {
	case syscall.EIO, syscall.ENODATA, syscall.EILSEQ, syscall.EREMOTEIO, syscall.ENXIO, syscall.ENODEV:
		return ErrIO
	case syscall.ENOSPC, syscall.EDQUOT:
		return ErrNoSpace
	case syscall.EROFS:
		return ErrReadOnly
	case syscall.ENOTSUP, syscall.ENOSYS, syscall.ENOTTY:
		return ErrUnsupported
	case syscall.ECANCELED:
		return ErrCanceled
	case syscall.ESHUTDOWN, syscall.ECONNRESET, syscall.EPIPE, syscall.ENOTCONN, syscall.ECONNABORTED:
		return ErrDisconnected
	}
	return nil
}
