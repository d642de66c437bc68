package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Flow is one that conntrack knows: where its first packet came from and went to, and where its replies come from.
type Flow struct {
	Protocol            uint8 // of IP: unix.IPPROTO_UDP, for example
	Source, Destination netip.AddrPort
	// Replier is Destination, unless the flow is led elsewhere.
	Replier netip.AddrPort
	Mark    uint32

	family uint8
	tuple  []byte // of the first packet, as the kernel has it
	id     []byte
	zone   []byte // nil: the usual one
}

// Forget has conntrack forget those flows of some protocols, in the network namespace of the calling thread, that match, and returns how many. They come to
// their next packet as new ones.
//
// The kernel walks all buckets of its one table for each reading, whoever's flows they hold: 10 ms of CPU with 262,144 of them. To tell of a flow costs 5 µs
// more, and a busy pod has tens of thousands of TCP. So where there are many (atOnce) it is asked for a protocol and a family at a time. If the table is
// made larger or smaller meanwhile the kernel may leave flows out, and does not say so.
func Forget(match func(*Flow) bool, protocols ...uint8) (n int, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil) // one socket for all that is asked
	if err != nil {
		return 0, fmt.Errorf("open conntrack: %w", err)
	}
	defer func() { _ = conn.Close() }()
	requests, err := readings(protocols)
	if err != nil {
		return 0, err
	}
	for _, r := range requests {
		told, err := conn.Execute(r)
		if err != nil {
			return n, fmt.Errorf("read flows (needs CAP_NET_ADMIN and nf_conntrack_netlink in the kernel): %w", err)
		}
		for _, m := range told {
			f, err := parseFlow(m.Data)
			if err != nil {
				return n, err
			}
			if !slices.Contains(protocols, f.Protocol) || !match(f) {
				continue
			}
			err = f.forget(conn)
			switch {
			case err == nil:
				n++
			case !errors.Is(err, unix.ENOENT): // else it has ended by itself, or its ends have another one now
				return n, fmt.Errorf("forget a flow from %s to %s: %w", f.Source, f.Destination, err)
			}
		}
	}
	return n, nil
}

// atOnce is how many flows are read with others among them.
const atOnce = 8000

// readings are the requests that tell of all flows of some protocols. Linux before 5.8 tells of all others as well.
func readings(protocols []uint8) ([]netlink.Message, error) {
	// How many there are is the namespace's own figure. Where it cannot be read they may be many.
	text, _ := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && n <= atOnce {
		return []netlink.Message{conntrackMessage(getFlow, netlink.Request|netlink.Dump, unix.AF_UNSPEC, nil)}, nil
	}
	var list []netlink.Message
	for _, protocol := range protocols {
		filter, err := only(protocol)
		if err != nil {
			return nil, err
		}
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} { // it filters by protocol within a family alone
			list = append(list, conntrackMessage(getFlow, netlink.Request|netlink.Dump, family, filter))
		}
	}
	return list, nil
}

// Of include/uapi/linux/netfilter/nfnetlink_conntrack.h. Numbers in attributes are in network order, but for a filter's flags.
const (
	getFlow    = 1 // IPCTNL_MSG_CT_GET
	deleteFlow = 2

	attrTuple      = 1 // CTA_TUPLE_ORIG
	attrReply      = 2
	attrFlowMark   = 8
	attrID         = 12
	attrZone       = 18
	attrFilter     = 25
	attrTupleIP    = 1
	attrTupleProto = 2
	attrSource4    = 1 // CTA_IP_V4_SRC
	attrDest4      = 2
	attrSource6    = 3
	attrDest6      = 4
	attrProtoNum   = 1
	attrSourcePort = 2
	attrDestPort   = 3

	attrFilterFirst = 1      // CTA_FILTER_ORIG_FLAGS: what of CTA_TUPLE_ORIG has to be the same
	filterProtocol  = 1 << 3 // CTA_FILTER_FLAG(CTA_PROTO_NUM) of net/netfilter/nf_conntrack_netlink.c
)

const nfgenmsgSize = 4 // nfgenmsg: family, version, resource

func conntrackMessage(kind netlink.HeaderType, flags netlink.HeaderFlags, family uint8, attributes []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_CTNETLINK<<8 | kind, Flags: flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attributes...),
	}
}

// only filters flows of a protocol.
func only(protocol uint8) ([]byte, error) {
	a := netlink.NewAttributeEncoder()
	a.Nested(attrFilter, func(a *netlink.AttributeEncoder) error {
		a.Uint32(attrFilterFirst, filterProtocol)
		return nil
	})
	a.Nested(attrTuple, func(a *netlink.AttributeEncoder) error {
		a.Nested(attrTupleProto, func(a *netlink.AttributeEncoder) error {
			a.Uint8(attrProtoNum, protocol)
			return nil
		})
		return nil
	})
	return a.Encode()
}

// forget has this flow forgotten, and none with its ends and another number. ENOENT: there is none.
func (f *Flow) forget(conn *netlink.Conn) error {
	a := netlink.NewAttributeEncoder()
	a.Bytes(unix.NLA_F_NESTED|attrTuple, f.tuple)
	a.Bytes(attrID, f.id)
	if f.zone != nil {
		a.Bytes(attrZone, f.zone)
	}
	which, err := a.Encode()
	if err == nil {
		_, err = conn.Execute(conntrackMessage(deleteFlow, netlink.Request|netlink.Acknowledge, f.family, which))
	}
	return err
}

func parseFlow(b []byte) (*Flow, error) {
	if len(b) < nfgenmsgSize {
		return nil, fmt.Errorf("the kernel tells of a flow in %d bytes", len(b))
	}
	f := &Flow{family: b[0]}
	err := attributes(b[nfgenmsgSize:], func(a *netlink.AttributeDecoder) (err error) {
		switch a.Type() {
		case attrTuple:
			f.tuple = a.Bytes()
			f.Source, f.Destination, err = f.parseTuple(f.tuple)
		case attrReply:
			f.Replier, _, err = f.parseTuple(a.Bytes())
		case attrFlowMark:
			f.Mark = a.Uint32()
		case attrID:
			f.id = a.Bytes()
		case attrZone:
			f.zone = a.Bytes()
		}
		return err
	})
	if err == nil && (f.id == nil || !f.Source.IsValid() || !f.Replier.IsValid()) {
		err = errors.New("its ends or its number are missing")
	}
	if err != nil {
		return nil, fmt.Errorf("what the kernel tells of a flow: %w", err)
	}
	return f, nil
}

// parseTuple reads the ends of a packet.
func (f *Flow) parseTuple(b []byte) (from, to netip.AddrPort, err error) {
	var source, destination netip.Addr
	var ports [2]uint16 // 0 where a protocol has none
	err = attributes(b, func(a *netlink.AttributeDecoder) error {
		switch a.Type() {
		case attrTupleIP:
			return attributes(a.Bytes(), func(a *netlink.AttributeDecoder) error {
				switch a.Type() {
				case attrSource4, attrSource6:
					source = Address(a.Bytes())
				case attrDest4, attrDest6:
					destination = Address(a.Bytes())
				}
				return nil
			})
		case attrTupleProto:
			return attributes(a.Bytes(), func(a *netlink.AttributeDecoder) error {
				switch a.Type() {
				case attrProtoNum:
					f.Protocol = a.Uint8()
				case attrSourcePort:
					ports[0] = a.Uint16()
				case attrDestPort:
					ports[1] = a.Uint16()
				}
				return nil
			})
		}
		return nil
	})
	return netip.AddrPortFrom(source, ports[0]), netip.AddrPortFrom(destination, ports[1]), err
}

// attributes calls visit with each attribute.
func attributes(b []byte, visit func(*netlink.AttributeDecoder) error) error {
	a, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return err
	}
	a.ByteOrder = binary.BigEndian
	for a.Next() {
		if err := visit(a); err != nil {
			return err
		}
	}
	return a.Err()
}

// Addresses are those of the calling thread's network namespace.
func Addresses() (map[netip.Addr]bool, error) {
	list, err := rtnetlink.AddrList(nil, rtnetlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("read the pod's addresses: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range list {
		if addr := Address(a.IP); addr.IsValid() {
			out[addr] = true
		}
	}
	return out, nil
}

// Address is an address as netlink has it; not valid, where that is none.
func Address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
