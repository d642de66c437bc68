package hold

import (
	"context"
	"encoding/binary"
	"fmt"

	nflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// bind binds the NFLOG group and has what comes there read. Packets that come while it does so are lost, and TCP sends them again: the library would
// take one for the kernel's answer and fail, so that an app that tries to connect without pause could keep the hold from its work.
func bind(ctx context.Context, l *nflog.Nflog, fn nflog.HookFunc, errfn nflog.ErrorFunc) error {
	filter, err := answersOnly()
	if err != nil {
		return err
	}
	if err := l.Con.SetBPF(filter); err != nil {
		return fmt.Errorf("keep packets out: %w", err)
	}
	if err := l.RegisterWithErrorFunc(ctx, fn, errfn); err != nil {
		return err
	}
	if err := l.Con.RemoveBPF(); err != nil {
		return fmt.Errorf("let packets in: %w", err)
	}
	return nil
}

// answersOnly is a filter that keeps out packets (NFULNL_MSG_PACKET, 0 of its subsystem), by the type in the header of a netlink message.
func answersOnly() ([]bpf.RawInstruction, error) {
	packet := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.NFNL_SUBSYS_ULOG<<8)) // as the filter's machine loads it
	return bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(packet), SkipTrue: 1},
		bpf.RetConstant{Val: 1<<32 - 1},
		bpf.RetConstant{Val: 0},
	})
}
