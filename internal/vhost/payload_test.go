package vhost

import (
	"bytes"
	"errors"
	"testing"
)

// examples are payloads as front-ends send them, by the request that they belong to.
var examples = map[Request][]byte{
	SetFeatures:   AppendU64(nil, 1<<32|1<<30),
	SetVringNum:   VringState{Index: 1, Num: 128}.Append(nil),
	SetVringAddr:  VringAddr{Index: 2, Flags: VringLog, Desc: 0x1000, Used: 0x2000, Avail: 0x3000, Log: 0x4000}.Append(nil),
	SetMemTable:   AppendMemTable(nil, []Region{{Guest: 0, Size: 1 << 20, User: 1 << 40, Offset: 0}, {Guest: 1 << 32, Size: 1 << 20, User: 1 << 41, Offset: 4096}}),
	AddMemReg:     AppendMemRegion(nil, Region{Guest: 1, Size: 2, User: 3, Offset: 4}),
	SetLogBase:    Log{Size: 4096, Offset: 8192}.Append(nil),
	GetConfig:     Config{Offset: 0, Size: 60, Data: make([]byte, 60)}.Append(nil),
	SetInflightFD: Inflight{Size: 8192, Offset: 64, Queues: 4, QueueSize: 128}.Append(nil),
}

// reencode parses a payload and makes it anew.
func reencode(r Request, p []byte) ([]byte, error) {
	switch r {
	case SetFeatures:
		v, err := ParseU64(p)
		return AppendU64(nil, v), err
	case SetVringNum:
		v, err := ParseVringState(p)
		return v.Append(nil), err
	case SetVringAddr:
		v, err := ParseVringAddr(p)
		return v.Append(nil), err
	case SetMemTable:
		v, err := ParseMemTable(p, nil)
		return AppendMemTable(nil, v), err
	case AddMemReg:
		v, err := ParseMemRegion(p)
		return AppendMemRegion(nil, v), err
	case SetLogBase:
		v, err := ParseLog(p)
		return v.Append(nil), err
	case GetConfig:
		v, err := ParseConfig(p)
		return v.Append(nil), err
	case SetInflightFD:
		v, err := ParseInflight(p)
		return v.Append(nil), err
	}
	return nil, ErrProtocol
}

func TestPayloads(t *testing.T) {
	for r, p := range examples {
		got, err := reencode(r, p)
		if err != nil || !bytes.Equal(got, p) {
			t.Errorf("%v: %x became %x, %v", r, p, got, err)
		}
		for _, bad := range [][]byte{nil, p[:len(p)-1], append(append([]byte(nil), p...), 0)} {
			if r == SetMemTable && len(bad) > len(p) {
				continue // may be longer than its regions
			}
			if _, err := reencode(r, bad); !errors.Is(err, ErrProtocol) {
				t.Errorf("%v of %d instead of %d bytes: %v", r, len(bad), len(p), err)
			}
		}
	}
	// As the specification has it, without what C adds.
	if i, err := ParseInflight(examples[SetInflightFD][:inflightBytes]); err != nil || i.QueueSize != 128 {
		t.Errorf("an inflight description without padding: %+v, %v", i, err)
	}
	// As front-ends send it that always send the whole structure.
	whole := append(AppendMemTable(nil, make([]Region, 1)), make([]byte, 7*regionBytes)...)
	if v, err := ParseMemTable(whole, nil); err != nil || len(v) != 1 {
		t.Errorf("a memory table in room for eight: %v, %v", v, err)
	}
	for name, p := range map[string][]byte{
		"regions without bytes": AppendU64(nil, 3),
		"nine regions":          AppendMemTable(nil, make([]Region, 9)),
	} {
		if _, err := ParseMemTable(p, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseConfig(Config{Size: MaxConfig + 1, Data: make([]byte, MaxConfig+1)}.Append(nil)); !errors.Is(err, ErrProtocol) {
		t.Errorf("too large an access to the configuration space: %v", err)
	}
}

// FuzzPayload: a payload is refused, or is what is sent for what was read.
func FuzzPayload(f *testing.F) {
	for r, p := range examples {
		f.Add(uint32(r), p)
	}
	f.Fuzz(func(t *testing.T, r uint32, p []byte) {
		got, err := reencode(Request(r), p)
		if err != nil {
			return
		}
		again, err := reencode(Request(r), got)
		if err != nil || !bytes.Equal(got, again) {
			t.Fatalf("%v: %x became %x and then %x, %v", Request(r), p, got, again, err)
		}
	})
}
