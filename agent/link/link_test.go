package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

func flip(addresses ...string) *mantletv1.AgentMessage {
	f := &mantletv1.NodeFlip{}
	for _, a := range addresses {
		f.Allowed = append(f.Allowed, Endpoint(netip.MustParseAddrPort(a)))
	}
	return &mantletv1.AgentMessage{Request: 7, What: &mantletv1.AgentMessage_Flip{Flip: f}}
}

func frame(b []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }

// What is sent is received, message by message.
func TestRoundTrip(t *testing.T) {
	var wire bytes.Buffer
	l := New(&wire)
	sent := []*mantletv1.AgentMessage{flip("10.0.0.1:80", "[fd00::1]:443"), {}, {Request: 1, What: &mantletv1.AgentMessage_Packets{Packets: make([]byte, 1<<20)}}}
	for _, m := range sent {
		if err := l.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range sent {
		got := new(mantletv1.AgentMessage)
		if err := l.Receive(got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, want) {
			t.Errorf("got %v, sent %v", got, want)
		}
	}
	if err := l.Receive(new(mantletv1.AgentMessage)); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

func TestRefused(t *testing.T) {
	nested, err := proto.Marshal(flip("10.0.0.1:80"))
	if err != nil {
		t.Fatal(err)
	}
	nested = bytes.Replace(nested, []byte{10, 0, 0, 1, 0x10}, []byte{10, 0, 0, 1, 0x70}, 1) // the port's field number becomes 14
	for _, c := range []struct {
		name string
		wire []byte
		want string
	}{
		{"cut in the length", []byte{0, 0}, "unexpected EOF"},
		{"too long", binary.BigEndian.AppendUint32(nil, MaxMessage+1), "at most"},
		{"cut in the message", append(binary.BigEndian.AppendUint32(nil, MaxMessage), "abc"...), "ends after 3 of"},
		{"no message", frame([]byte{0xff, 0xff}), "link: "},
		{"unknown field", frame([]byte{0xf8, 0x01, 0x01}), "not known"},
		{"unknown field inside", frame(nested), "not known"},
		{"too many in it", frame(empties(MaxParts)), "with 1048577 parts in it"},
	} {
		err := New(bytes.NewBuffer(c.wire)).Receive(new(mantletv1.AgentMessage))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	for _, e := range []*mantletv1.NodeEndpoint{
		nil, {Address: []byte{1, 2, 3}, Port: 1}, {Address: netip.MustParseAddr("::ffff:10.0.0.1").AsSlice(), Port: 1}, {Address: []byte{1, 2, 3, 4}, Port: 65536},
	} {
		if got, err := AddrPort(e); err == nil {
			t.Errorf("%v: %v", e, got)
		}
	}
}

// empties is a message with one that has that many empty ones.
func empties(n int) []byte {
	b := protowire.AppendTag(nil, 5, protowire.BytesType) // AgentMessage.flip
	return append(protowire.AppendVarint(b, uint64(2*n)), bytes.Repeat([]byte{0x0a, 0}, n)...)
}

// What is read takes some times the memory that it takes on the way, and no more: it is the node's memory, and the pod's agent that writes.
func TestMemory(t *testing.T) {
	for _, n := range []int{MaxParts - 1, 2 * MaxParts} {
		wire := frame(empties(n))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := New(bytes.NewBuffer(wire)).Receive(new(mantletv1.AgentMessage))
		runtime.ReadMemStats(&after)
		if (err == nil) != (n < MaxParts) {
			t.Errorf("%d messages: %v", n, err)
		}
		if took := int(after.TotalAlloc - before.TotalAlloc); took > 8*MaxMessage {
			t.Errorf("%d messages take %d MiB", n, took>>20)
		}
	}
}

// Whatever comes is an error or a message that would be written the same way again.
func FuzzReceive(f *testing.F) {
	b, err := proto.Marshal(flip("10.0.0.1:80"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(frame(b))
	f.Add([]byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, wire []byte) {
		m := new(mantletv1.AgentMessage)
		if New(bytes.NewBuffer(wire)).Receive(m) != nil {
			return
		}
		var again bytes.Buffer
		if err := New(&again).Send(m); err != nil {
			t.Fatal(err)
		}
		same := new(mantletv1.AgentMessage)
		if err := New(&again).Receive(same); err != nil || !proto.Equal(m, same) {
			t.Errorf("%v became %v, %v", m, same, err)
		}
	})
}
