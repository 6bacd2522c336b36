package vhost

import "fmt"

// Request is the type of a message from front-end to back-end, and of its reply.
type Request uint32

// The requests of a front-end. Those that are missing belong to devices of other types or
// to features that nobody here offers.
const (
	GetFeatures         Request = 1
	SetFeatures         Request = 2
	SetOwner            Request = 3
	ResetOwner          Request = 4
	SetMemTable         Request = 5
	SetLogBase          Request = 6
	SetLogFD            Request = 7
	SetVringNum         Request = 8
	SetVringAddr        Request = 9
	SetVringBase        Request = 10
	GetVringBase        Request = 11
	SetVringKick        Request = 12
	SetVringCall        Request = 13
	SetVringErr         Request = 14
	GetProtocolFeatures Request = 15
	SetProtocolFeatures Request = 16
	GetQueueNum         Request = 17
	SetVringEnable      Request = 18
	SetBackendReqFD     Request = 21
	GetConfig           Request = 24
	SetConfig           Request = 25
	GetInflightFD       Request = 31
	SetInflightFD       Request = 32
	ResetDevice         Request = 34
	GetMaxMemSlots      Request = 36
	AddMemReg           Request = 37
	RemMemReg           Request = 38
	SetStatus           Request = 39
	GetStatus           Request = 40
)

// The requests of a back-end, on the socket that SetBackendReqFD has brought.
const (
	BackendConfigChange Request = 2
)

var requestNames = map[Request]string{
	GetFeatures: "GET_FEATURES", SetFeatures: "SET_FEATURES", SetOwner: "SET_OWNER", ResetOwner: "RESET_OWNER",
	SetMemTable: "SET_MEM_TABLE", SetLogBase: "SET_LOG_BASE", SetLogFD: "SET_LOG_FD", SetVringNum: "SET_VRING_NUM",
	SetVringAddr: "SET_VRING_ADDR", SetVringBase: "SET_VRING_BASE", GetVringBase: "GET_VRING_BASE",
	SetVringKick: "SET_VRING_KICK", SetVringCall: "SET_VRING_CALL", SetVringErr: "SET_VRING_ERR",
	GetProtocolFeatures: "GET_PROTOCOL_FEATURES", SetProtocolFeatures: "SET_PROTOCOL_FEATURES",
	GetQueueNum: "GET_QUEUE_NUM", SetVringEnable: "SET_VRING_ENABLE", SetBackendReqFD: "SET_BACKEND_REQ_FD",
	GetConfig: "GET_CONFIG", SetConfig: "SET_CONFIG", GetInflightFD: "GET_INFLIGHT_FD", SetInflightFD: "SET_INFLIGHT_FD",
	ResetDevice: "RESET_DEVICE", GetMaxMemSlots: "GET_MAX_MEM_SLOTS", AddMemReg: "ADD_MEM_REG", RemMemReg: "REM_MEM_REG",
	SetStatus: "SET_STATUS", GetStatus: "GET_STATUS",
}

// String returns the name that the specification gives a front-end's request.
func (r Request) String() string {
	if n, ok := requestNames[r]; ok {
		return n
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Feature bits of vhost among those of virtio, as numbers of bits.
const (
	FLogAll           = 26 // the back-end marks the pages that it writes to
	FProtocolFeatures = 30 // protocol features can be negotiated
)

// ProtocolFeatures is a set of protocol features.
type ProtocolFeatures uint64

// The protocol features, as numbers of bits.
const (
	PMultiQueue        = 0
	PLogSHMFD          = 1
	PReplyAck          = 3
	PBackendReq        = 5
	PConfig            = 9
	PBackendSendFD     = 10
	PHostNotifier      = 11
	PInflightSHMFD     = 12
	PResetDevice       = 13
	PInbandNotify      = 14
	PConfigureMemSlots = 15
	PStatus            = 16
)

// Has reports whether the bit with that number is in the set.
func (f ProtocolFeatures) Has(bit uint) bool { return f>>bit&1 != 0 }

// ProtocolSet makes a set of the bits with these numbers.
func ProtocolSet(numbers ...uint) ProtocolFeatures {
	var f ProtocolFeatures
	for _, bit := range numbers {
		f |= 1 << bit
	}
	return f
}

// Flags of a message.
const (
	spoken        uint32 = 1 // version of the protocol
	spokenMask    uint32 = 3
	FlagReply     uint32 = 1 << 2 // the message answers one of that type
	FlagNeedReply uint32 = 1 << 3 // the receiver is to answer with a U64, 0 for success (with PReplyAck)
)

// Bounds of a message.
const (
	HeaderBytes = 12
	// MaxPayload is the most bytes behind a header that are received: more than the
	// longest message has, a configuration space of MaxConfig bytes with 12 before it.
	MaxPayload = 512
	// MaxFiles is the most descriptors that come with a message.
	MaxFiles = 8
	// MaxRegions is the most regions of a memory table in one message.
	MaxRegions = 8
	// MaxConfig is the most bytes of a configuration space in one message.
	MaxConfig = 256
	// PageBytes is what one bit of the log of dirty pages stands for.
	PageBytes = 4096
)

// VringFile is the payload of SetVringKick, SetVringCall and SetVringErr.
type VringFile uint64

// NoFile, in a VringFile, says that no descriptor comes with it.
const NoFile VringFile = 1 << 8

// Index returns the number of the queue.
func (v VringFile) Index() int { return int(v & 0xff) }

// VringLog, in VringAddr.Flags, says that writes to the used ring are to be marked.
const VringLog uint32 = 1 << 0
