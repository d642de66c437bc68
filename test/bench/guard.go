package main

import (
	"context"
	"errors"
	"io"
)

func guard(context.Context, options, io.Writer) error    { return errors.New("later") }
func document(context.Context, options, io.Writer) error { return errors.New("later") }
