package control

import (
	"context"
	"errors"
	"net/http"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Kind classifies an error for programs; the command line gives each kind an
// exit status.
type Kind string

// The kinds of error.
const (
	KindInvalid     Kind = "invalid"     // the request makes no sense
	KindNotFound    Kind = "not-found"   // no such guest, volume or pool
	KindExists      Kind = "exists"      // the name is taken
	KindNoSpace     Kind = "no-space"    // the pool is full
	KindRefused     Kind = "refused"     // sensible, and not now: the message says why
	KindUnavailable Kind = "unavailable" // no guest serves this
	KindNotRunning  Kind = "not-running" // there is no agent, or nothing runs at all
	KindTimeout     Kind = "timeout"
	KindCorrupt     Kind = "corrupt"
	KindUnsupported Kind = "unsupported"
	KindInternal    Kind = "internal"
)

// Error is an error as it travels.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"` // what to do about it
}

// Error returns the message, and the hint after it when there is one.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + " (" + e.Hint + ")"
}

// NewError makes an error; hint says what to do about it and may be empty.
func NewError(kind Kind, message, hint string) *Error {
	return &Error{Kind: kind, Message: message, Hint: hint}
}

// KindOf returns the kind of any error: of an [Error] in its chain, else by
// the error kinds of the layers below.
func KindOf(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, block.ErrNotFound):
		return KindNotFound
	case errors.Is(err, block.ErrExists):
		return KindExists
	case errors.Is(err, block.ErrInvalid), errors.Is(err, block.ErrReadOnly):
		return KindInvalid
	case errors.Is(err, block.ErrNoSpace):
		return KindNoSpace
	case errors.Is(err, block.ErrCorrupt):
		return KindCorrupt
	case errors.Is(err, block.ErrUnsupported), errors.Is(err, hpdi.ErrUnsupported):
		return KindUnsupported
	case errors.Is(err, block.ErrClosed), errors.Is(err, block.ErrStale):
		return KindUnavailable
	case errors.Is(err, hpdi.ErrLocked):
		return KindRefused
	case errors.Is(err, context.DeadlineExceeded):
		return KindTimeout
	}
	return KindInternal
}

// AsError returns err as it travels.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		if err == error(e) {
			return e
		}
		// The text around e holds its hint already.
		return &Error{Kind: e.Kind, Message: err.Error()}
	}
	return &Error{Kind: KindOf(err), Message: err.Error()}
}

func httpStatus(k Kind) int {
	switch k {
	case KindInvalid:
		return http.StatusBadRequest
	case KindNotFound:
		return http.StatusNotFound
	case KindExists, KindRefused:
		return http.StatusConflict
	case KindNoSpace:
		return http.StatusInsufficientStorage
	case KindUnavailable, KindNotRunning:
		return http.StatusServiceUnavailable
	case KindTimeout:
		return http.StatusGatewayTimeout
	case KindUnsupported:
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}
