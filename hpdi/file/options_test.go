package file

import (
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

func TestParseOptions(t *testing.T) {
	for query, want := range map[string]Options{
		"":                         {Direct: DirectAuto, Fixed: FixedAuto},
		"direct=on&poll=50us":      {Direct: DirectOn, Fixed: FixedAuto, Poll: 50 * time.Microsecond},
		"thread=on":                {Direct: DirectAuto, Fixed: FixedAuto, Thread: true},
		"block=on":                 {Direct: DirectAuto, Fixed: FixedAuto, Block: true},
		"read-only=on&lock=yes":    {Direct: DirectAuto, Fixed: FixedAuto, ReadOnly: true, Lock: true},
		"fixed=off&direct=off":     {Direct: DirectOff, Fixed: FixedOff},
		"poll=10ms&read-only=0":    {Direct: DirectAuto, Fixed: FixedAuto, Poll: MaxPoll},
		"lock=off&direct=auto":     {Direct: DirectAuto, Fixed: FixedAuto},
		"fixed=auto&poll=0.5ms":    {Direct: DirectAuto, Fixed: FixedAuto, Poll: 500 * time.Microsecond},
		"lock=1&poll=0s&fixed=off": {Direct: DirectAuto, Fixed: FixedOff, Lock: true},
	} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseOptions(values)
		if err != nil || got != want {
			t.Errorf("%q gives %+v, %v, want %+v", query, got, err, want)
		} else if err := got.Validate(); err != nil {
			t.Errorf("%q gives options that are refused: %v", query, err)
		}
	}
	for query, want := range map[string]string{
		"direct=maybe":  "one of auto, on, off",
		"engine=sync":   "direct, read-only, lock, fixed, poll, block, thread",
		"poll=11ms":     "from 0s to 10ms",
		"poll=-1us":     "from 0s to 10ms",
		"lock=on&fixed": "one of auto, off",
	} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseOptions(values); !errors.Is(err, hpdi.ErrProperty) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q gives %+v, %v, want an error that says %q", query, got, err, want)
		}
	}
	for _, o := range []Options{{Fixed: "on"}, {Poll: -1}, {Poll: MaxPoll + 1}} {
		if err := o.Validate(); err == nil {
			t.Errorf("%+v is valid", o)
		}
	}
}
